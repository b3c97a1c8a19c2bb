"""Prompts that no task of a pool explains: what is normal for a log, and who falls out of it.

A prompt is strange when the router is less sure of it, or its features lie farther from every task's centre, than all but
SHARE of the prompts that the pool was calibrated on. A few always are; a new task shows in their number.
Source of the distance: Mahalanobis, of one covariance for all classes, https://arxiv.org/abs/1807.03888.
"""

import zlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

SHARE = 0.01  # of normal prompts beyond each of the two thresholds
LEAST = 10  # strange prompts that are worth a word
KEPT = 256  # prompts kept for the next training
AXES = 128  # directions that have a variance of their own; the rest share one
RIDGE = 0.1  # added to every variance, in units of a feature's own over the whole log


class Normal(NamedTuple):
    """What is normal.

    centres: `[T, H]` of the tasks; axes: `[H, R]` principal directions around them; variance: `[R]` along each; rest: in any
        direction else.
    distance: which normal prompts keep to their nearest centre; confidence: the router's which they keep above.
    """

    centres: np.ndarray
    axes: np.ndarray
    variance: np.ndarray
    rest: np.ndarray
    distance: np.ndarray
    confidence: np.ndarray


def normal(train: np.ndarray, task: np.ndarray, judged: np.ndarray, confidence: np.ndarray) -> Normal:
    """What is normal for a log.

    Args:
        train: `[N, H]` standardised features; task: `[N]` the cluster of each.
        judged: `[M, H]` standardised features of other prompts; confidence: `[M]` the router's in its likeliest task.
    """
    own = np.unique(task, return_inverse=True)[1]
    centres = np.stack([train[own == t].mean(0) for t in range(own.max() + 1)])
    around = train - centres[own]
    variance, axes = np.linalg.eigh(around.T @ around / len(train) + RIDGE * np.eye(train.shape[1]))
    kept = slice(max(len(variance) - AXES, 0), None)
    rest = np.array(variance[: kept.start].mean() if kept.start else RIDGE)
    least_sure = np.round(np.quantile(confidence, SHARE), 4)  # completions tell their confidence no finer
    known = Normal(centres, axes[:, kept], variance[kept], rest, np.array(0.0), least_sure)
    return known._replace(distance=np.quantile(distance(known, judged), 1 - SHARE))


def distance(known: Normal, features: np.ndarray) -> np.ndarray:
    """Mahalanobis distance `[N]` of standardised features `[N, H]` from the nearest centre."""
    squared = ((features[:, None] - known.centres) ** 2).sum(-1)
    along = ((features @ known.axes)[:, None] - known.centres @ known.axes) ** 2
    whole = (along / known.variance).sum(-1) + np.maximum(squared - along.sum(-1), 0) / known.rest
    return np.sqrt(whole.min(-1))


def strange(known: Normal, features: np.ndarray, confidence: np.ndarray) -> np.ndarray:
    """Which prompts `[N]` resemble no task, by standardised features `[N, H]` and the router's confidence `[N]`."""
    return (confidence < known.confidence) | (distance(known, features) > known.distance)


def unexplained(number: int, prompts: int) -> bool:
    """Whether so many strange prompts are more than twice what is normal, where each threshold leaves out its share."""
    return number >= LEAST and number > 2 * (2 * SHARE) * prompts


def kept(names: Iterable[str], most: int = KEPT) -> list[str]:
    """A sample of at most so many of the names, uniform and the same in whatever order and however often they come."""
    return sorted(set(names), key=lambda name: (zlib.crc32(name.encode()), name))[:most]
