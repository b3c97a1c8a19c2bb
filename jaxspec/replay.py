"""Features of prompts, kept so that the router can learn from traffic without forgetting: who was served, and what is known.

The pool keeps features of prompts of every task; a job that judges all drafters along every text adds whom the target agreed
with. Trained on both, the router finds new wordings of old tasks and keeps the old ones: no prompt is read again.
Source of replaying old clusters' features when traffic shifts: https://arxiv.org/abs/2311.14756, there with inverted images.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from jaxspec import router, shift
from jaxspec.router import RouterParams

MOST = 256  # prompts kept of a task
MARGIN = 1.0  # nats, about a token's worth, by which another task's drafter must have done better to take a prompt over
GROUP = 10  # prompts of a refresh that are a group of their own beside those that their task had before
HELD_OUT = 4  # of so many prompts one is not trained on


class Served(NamedTuple):
    """Prompts as a job has served them.

    name: `[N]` ids; features: `[N, H]`; task: `[N]` the router's.
    agreement: `[N, D]` nats that the text has moved the weight of each drafter by, see `experience.moved`; the tasks' own come
    first, and last what adapters belong on.
    accepted, drafted: `[N]` tokens.
    """

    name: np.ndarray
    features: np.ndarray
    task: np.ndarray
    agreement: np.ndarray
    accepted: np.ndarray
    drafted: np.ndarray


class Known(NamedTuple):
    """Prompts whose task is known.

    name: `[N]` ids; features: `[N, H]`; task: `[N]`; refresh: `[N]` which one brought the prompt, 0 for the pool's own log.
    """

    name: np.ndarray
    features: np.ndarray
    task: np.ndarray
    refresh: np.ndarray


Prompts = TypeVar("Prompts", Served, Known)


def bounded(parts: Sequence[Prompts], most: int) -> Prompts:
    """At most so many of the parts' prompts, see `shift.kept`; of a name that appears again the last counts."""
    whole = type(parts[0])(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
    place = {str(name): i for i, name in enumerate(whole.name)}
    rows = [place[name] for name in shift.kept(place, most)]
    return type(whole)(*(column[rows] for column in whole))


def bounded_by_task(parts: Sequence[Known], most: int = MOST) -> Known:
    """At most so many of the parts' prompts of each task."""
    whole = bounded(parts, sum(len(part.name) for part in parts))
    of = lambda task: Known(*(column[whole.task == task] for column in whole))
    each = [bounded([of(task)], most) for task in np.unique(whole.task)]
    return Known(*(np.concatenate(columns) for columns in zip(*each, strict=True)))


def labelled(served: Served, tasks: int, refresh: int) -> Known:
    """Served prompts with the task whose drafter the target has agreed with most; the router's stays where that is close.

    Left out are prompts that what adapters belong on would have drafted for better than every task's drafter.
    """
    row, own = np.arange(len(served.task)), served.agreement[:, :tasks]
    best = own.argmax(1)
    task = np.where(own[row, best] > own[row, served.task] + MARGIN, best, served.task)
    explained = served.agreement[:, -1] <= own.max(1) + MARGIN
    number = np.full(len(row), refresh)
    return Known(*(column[explained] for column in (served.name, served.features, task, number)))


def held_out(known: Known) -> np.ndarray:
    """Which prompts `[N]` are not trained on: one of HELD_OUT in each task and refresh, by their order."""
    number, count = np.zeros(len(known.task), int), dict[tuple[int, int], int]()
    for i, group in enumerate(zip(known.task.tolist(), known.refresh.tolist(), strict=True)):
        number[i] = count[group] = count.get(group, -1) + 1
    return number % HELD_OUT == HELD_OUT - 1


def normal(params: RouterParams, known: Known, confidence: np.ndarray) -> shift.Normal:
    """What is normal once prompts are known; new wordings that are GROUP or more have a centre of their own.

    Args:
        confidence: `[N]` of the router.
    """
    judged, features = held_out(known), np.asarray(router.standardised(params, known.features))
    group = lambda refresh: np.unique(np.stack([known.task, refresh], 1), axis=0, return_inverse=True)
    size = np.bincount(group(known.refresh)[1].ravel())[group(known.refresh)[1].ravel()]
    groups, cluster = group(np.where(size < GROUP, 0, known.refresh))
    train, rest = (cluster.ravel()[rows] for rows in (~judged, judged))
    return shift.normal(features[~judged], train, features[judged], rest, confidence[judged], groups[:, 0])
