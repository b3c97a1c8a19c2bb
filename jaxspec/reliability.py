"""Which specialists can be relied on, by what prompts that they served had accepted.

A specialist is kept where it takes no more rounds than what adapters belong on would have taken for the same tokens, by the
calibration; one that fails is left out, but for a probe now and then by which it comes back.
Source of one weight a model, learnt from use: https://arxiv.org/abs/2311.14756; there it is learnt by exploring, here
every prompt is evidence.
"""

from typing import Any, NamedTuple

import numpy as np

from jaxspec.engine import Method, Routes
from jaxspec.router import TRUNK
from jaxspec.store.facts import tokens_a_round
from jaxspec.store.names import drafter_names

DECAY = 0.9  # what a prompt's evidence is worth after one more of the same drafter
EVIDENCE = 10.0  # rounds below which nobody is judged
MARGIN = 0.9  # of the expected rounds: a little bad luck is none of the drafter's fault
PROBE = 16  # prompts of a drafter that is left out, one of which it serves


class Evidence(NamedTuple):
    """What is known of D specialists.

    rounds: `[D]` that their prompts took, decayed; expected: `[D]` rounds that the trunk would have taken for the tokens.
    withheld: `[D]` prompts that each would have served, had it been relied on, since it served last.
    """

    rounds: np.ndarray
    expected: np.ndarray
    withheld: np.ndarray


def unknown(number: int) -> Evidence:
    """Nothing is known of so many specialists."""
    return Evidence(np.zeros(number), np.zeros(number), np.zeros(number, int))


def observed(evidence: Evidence, drafter: int, rounds: float, expected: float) -> Evidence:
    """One more prompt that a drafter served in so many rounds, for which the trunk would have taken `expected`."""
    own = np.arange(len(evidence.rounds)) == drafter
    add = lambda sums, value: np.where(own, DECAY * sums + value, sums)
    withheld = np.where(own, 0, evidence.withheld)
    return Evidence(add(evidence.rounds, rounds), add(evidence.expected, expected), withheld)


def missed(evidence: Evidence, drafter: int) -> Evidence:
    """One more prompt that the trunk served in a drafter's place."""
    return evidence._replace(withheld=evidence.withheld + (np.arange(len(evidence.withheld)) == drafter))


def reliable(evidence: Evidence) -> np.ndarray:
    """Which specialists `[D]` may serve."""
    return (evidence.rounds < EVIDENCE) | (MARGIN * evidence.rounds <= evidence.expected)


def served(evidence: Evidence, routes: np.ndarray) -> np.ndarray:
    """Routes with TRUNK in place of specialists that are left out, but for a probe once PROBE - 1 prompts were withheld."""
    own = np.clip(routes, 0, len(evidence.rounds) - 1)
    specialist = (routes >= 0) & (routes < len(evidence.rounds))
    out = specialist & ~reliable(evidence)[own] & (evidence.withheld[own] < PROBE - 1)
    return np.where(out, TRUNK, routes)


class Reliability:
    """The evidence of one run with a pool, and the routes that follow from it."""

    def __init__(self, facts: dict[str, Any], num_speculative_tokens: int):
        self.evidence = unknown(len(facts["tasks"]))
        self._trunk = tokens_a_round(facts, drafter_names(facts)[-1:], [num_speculative_tokens])[0, :, 0]

    def saw(self, route: int, task: int, rounds: int, tokens: int) -> None:
        """A prompt of the router's task was answered in so many rounds by a route; only specialists are judged."""
        if 0 <= route < len(self.evidence.rounds):
            self.evidence = observed(self.evidence, route, rounds, tokens / self._trunk[task])
        elif task in self.left_out():
            self.evidence = missed(self.evidence, task)

    def over(self, method: Method) -> Method:
        """The method without the specialists that cannot be relied on; its prompts are then served by the trunk."""

        def route(features: np.ndarray) -> Routes:
            found = method.route(features)
            return found._replace(route=served(self.evidence, found.route))

        return method._replace(route=route)

    def left_out(self) -> list[int]:
        """Specialists that are not relied on by now."""
        return np.flatnonzero(~reliable(self.evidence)).tolist()
