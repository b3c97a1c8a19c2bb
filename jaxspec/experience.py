"""Which drafter the next prompt of a task begins with, by what earlier ones had: Hedge over whole texts.

A row that changes its drafter as it goes ends with a weight for each of them, whoever drafted (`drafters.hedge`). How far
its text has moved these weights is added up for the router's task, older texts fade, and none falls so far behind that it
could not come back. It is kept on the host and read when a prompt gets its slot, so rows do not see one another.
Source: Not-a-Bandit (HedgeSpec), https://arxiv.org/abs/2510.20064, which has one sequence of tokens for all texts.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from jaxspec.drafters.hedge import prior
from jaxspec.engine import Method, Routes
from jaxspec.router import TRUNK

DECAY = 0.9  # what a text's evidence is worth after one more of the same task
BOUND = 16.0  # nats that a drafter falls behind the first at most: two or three texts make them up


def moved(log_weights: np.ndarray, choice: np.ndarray) -> np.ndarray:
    """Nats `[N, D]` that texts have moved log weights `[N, D]` by since they began with the routes `choice [N]`."""
    return log_weights - _begun(choice, log_weights.shape[1])


def learnt(log_weights: np.ndarray, evidence: np.ndarray) -> np.ndarray:
    """Log weights `[D]`, the first of them 0, after one more text that moved its own by `evidence [D]`."""
    summed = DECAY * log_weights + evidence
    return np.maximum(summed - summed.max(), -BOUND)


class Experience:
    """The weights of one run with a pool, `[T + 1, D]`: a row a task, and one for prompts that the router gives none.

    Args:
        begin: the drafter that each task's prompts begin with, as a route, as long as nothing is known.
        number: D drafters, of which the last is the route TRUNK.
        fallback_below: the router's confidence below which a prompt has no task.
    """

    def __init__(self, begin: Sequence[int], number: int, fallback_below: float):
        self._begin, self._number, self._fallback_below = np.array([*begin, TRUNK]), number, fallback_below
        self.log_weights = np.array([learnt(np.zeros(number), own) for own in _begun(self._begin, number)])

    def saw(self, task: int, confidence: float, route: int, log_weights: Sequence[float]) -> None:
        """A text of the router's task began with a route and ended with these log weights `[D]`."""
        (own,) = self._rows(np.array([task]), np.array([confidence]))
        evidence = moved(np.array([log_weights]), np.array([route]))[0]
        self.log_weights[own] = learnt(self.log_weights[own], evidence)

    def over(self, method: Method) -> Method:
        """The method, its prompts beginning with the heaviest drafter of their task; where it has other reasons, as it says."""

        def route(features: np.ndarray) -> Routes:
            found = method.route(features)
            own = self._rows(found.task, found.confidence)
            return found._replace(route=np.where(found.route == self._begin[own], self.routes()[own], found.route))

        return method._replace(route=route)

    def routes(self) -> np.ndarray:
        """`[T + 1]` the route that prompts of each task begin with by now."""
        best = self.log_weights.argmax(1)
        return np.where(best == self._number - 1, TRUNK, best)

    def _rows(self, task: np.ndarray, confidence: np.ndarray) -> np.ndarray:
        return np.where(confidence < self._fallback_below, len(self._begin) - 1, task)


def _begun(route: np.ndarray, number: int) -> np.ndarray:
    return np.asarray(prior(jnp.asarray(route) % number, number))
