"""Prompts that no task of a pool explains: what is normal for a log, and who falls out of it.

A prompt is strange when the router is less sure of it, or its features lie farther from the centre of the task that it is
taken for, than all but SHARE of the prompts that the pool was calibrated on. A few always are; a new task shows in their
number. Tasks have limits of their own: what is near for chat, which is of everything, is far for one wording of SQL.
Source of the distance: Mahalanobis, of one covariance for all classes, https://arxiv.org/abs/1807.03888.
"""

import zlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

SHARE = 0.01  # of normal prompts beyond each of the two thresholds
DEVIATIONS = 2.33  # beyond which SHARE of a normal distribution lies
FEW = 10  # prompts of a cluster below which those of all clusters say what is far
FOREIGN = 1e9  # strangeness of a task to prompts of another
LEAST = 10  # strange prompts that are worth a word
KEPT = 256  # prompts kept for the next training
AXES = 128  # directions that have a variance of their own; the rest share one
RIDGE = 0.1  # added to every variance, in units of a feature's own over the whole log


class Normal(NamedTuple):
    """What is normal.

    centres: `[C, H]` of prompts that belong together; task: `[C]` whose each is.
    axes: `[H, R]` principal directions around them; variance: `[R]` along each; rest: in any direction else.
    distance: `[C]` which normal prompts keep to their own centre; confidence: the router's which they keep above.
    """

    centres: np.ndarray
    axes: np.ndarray
    variance: np.ndarray
    rest: np.ndarray
    distance: np.ndarray
    confidence: np.ndarray
    task: np.ndarray


def normal(
    train: np.ndarray,
    cluster: np.ndarray,
    judged: np.ndarray,
    judged_cluster: np.ndarray,
    confidence: np.ndarray,
    task: np.ndarray | None = None,
) -> Normal:
    """What is normal for a log.

    Args:
        train: `[N, H]` standardised features; cluster: `[N]` from 0, none of them empty.
        judged: `[M, H]` standardised features of other prompts; judged_cluster: `[M]`.
        confidence: `[M]` the router's in its likeliest task.
        task: `[C]` of each cluster; None where they are the tasks.
    """
    number = int(cluster.max()) + 1
    centres = np.stack([train[cluster == c].mean(0) for c in range(number)])
    around = train - centres[cluster]
    variance, axes = np.linalg.eigh(around.T @ around / len(train) + RIDGE * np.eye(train.shape[1]))
    kept = slice(max(len(variance) - AXES, 0), None)
    rest = np.array(variance[: kept.start].mean() if kept.start else RIDGE)
    least_sure = np.round(np.quantile(confidence, SHARE), 4)  # completions tell their confidence no finer
    owner = np.arange(number) if task is None else task
    known = Normal(centres, axes[:, kept], variance[kept], rest, np.zeros(number), least_sure, owner)
    own = distances(known, judged)[np.arange(len(judged)), judged_cluster]
    enough = lambda some: some if len(some) >= FEW else own
    return known._replace(distance=np.array([_limit(enough(own[judged_cluster == c])) for c in range(number)]))


def distances(known: Normal, features):
    """Mahalanobis distances `[N, C]` of standardised features `[N, H]`, on the host or traced, from all centres."""
    squared = ((features[:, None] - known.centres) ** 2).sum(-1)
    along = ((features @ known.axes)[:, None] - known.centres @ known.axes) ** 2
    return ((along / known.variance).sum(-1) + (squared - along.sum(-1)).clip(0) / known.rest) ** 0.5


def strangeness(known: Normal, features, task):
    """How many times the limit prompts `[N]` lie from the task that they are taken for.

    Args:
        features: `[N, H]` standardised; task: `[N]`.
    """
    other = known.task != task[:, None]
    return (distances(known, features) / known.distance + FOREIGN * other).min(-1)


def far(known: Normal, features, task):
    """Which prompts `[N]` are unlike the task that they are taken for, as `strangeness`."""
    return strangeness(known, features, task) > 1


def strange(known: Normal, features: np.ndarray, task: np.ndarray, confidence: np.ndarray) -> np.ndarray:
    """Which prompts `[N]` are far from their task `[N]`, or of less than normal confidence `[N]`."""
    return (confidence < known.confidence) | far(known, features, task)


def _limit(distance: np.ndarray) -> float:
    """What all but SHARE of a cluster's distances keep to; few of them say it through their mean and deviation."""
    if FEW <= len(distance) < 1 / SHARE:
        return float(distance.mean() + DEVIATIONS * distance.std())
    return float(np.quantile(distance, 1 - SHARE))


def unexplained(number: int, prompts: int) -> bool:
    """Whether so many strange prompts are more than twice what is normal, where each threshold leaves out its share."""
    return number >= LEAST and number > 2 * (2 * SHARE) * prompts


def kept(names: Iterable[str], most: int = KEPT) -> list[str]:
    """A sample of at most so many of the names, uniform and the same in whatever order and however often they come."""
    return sorted(set(names), key=lambda name: (zlib.crc32(name.encode()), name))[:most]
