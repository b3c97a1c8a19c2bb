"""The loop on two meshes: the drafter's half of every round on one, the target's on the other, both at once.

The host dispatches and does not wait: the target verifies a draft while the drafter does what it does `meanwhile`. So the
schedule is CARD's, https://arxiv.org/abs/2508.04462, for drafters that have such work; others take turns with the target.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import Array
from jax.sharding import Mesh

from jaxspec.sharding import held, moved
from jaxspec.speculate import told
from jaxspec.types import Draft, Judgement, SpecInfo, SpecParams, SpecState, Speculator


class Halves(NamedTuple):
    """A round's jitted programs; the second argument of each is consumed, and so are a row's stats.

    propose: (drafter's params, drafter's state, text) -> (draft, drafter's state), on the drafter's mesh.
    verify: (target's params, target's state, text, draft) -> (text, target's state, judgement), on the target's.
    meanwhile: (drafter's params, drafter's state) -> drafter's state; reads no output of `verify`.
    close: (drafter's params, drafter's state, stats, draft, judgement, start `[B]`) -> (drafter's state, stats).
    """

    propose: Callable
    verify: Callable
    meanwhile: Callable
    close: Callable


def apart(
    spec: Speculator, fold: Callable[[Any, SpecInfo], Any], *, target: Mesh, drafter: Mesh
) -> Callable[[SpecParams, SpecState, Any], tuple[SpecState, Any]]:
    """As `speculate.run` until every row has ended, with the same tokens and stats, each half on a mesh of its own.

    Args:
        fold: as in `run`; scores stay with the target, so that `info` has None of them, and so has a drafter's commit.

    Returns:
        (params, state, stats) -> (state, stats): `params` are each on its mesh, `state` and `stats` anywhere and consumed.
    """
    programs = halves(spec, fold, target, drafter)
    there, here = (lambda tree: moved(tree, target, "target")), (lambda tree: moved(tree, drafter, "drafter"))

    def run(params: SpecParams, state: SpecState, stats: Any) -> tuple[SpecState, Any]:
        own, stats = here((state.drafter, stats))
        cache, text = there((state.target, state._replace(target=(), drafter=())))
        running: Array | bool = True
        while running:
            before, seen = text.done, here(text)
            draft, own = programs.propose(params.drafter, own, seen)
            text, cache, judgement = programs.verify(params.target, cache, text, there(draft))
            own = programs.meanwhile(params.drafter, own)
            own, stats = programs.close(params.drafter, own, stats, draft, here(judgement), seen.length)
            # Of the round before, which the devices have behind them: a wait for this one would leave them idle.
            running = ~before.all()
        return text._replace(target=cache, drafter=own), stats

    return run


def halves(spec: Speculator, fold: Callable, target: Mesh, drafter: Mesh) -> Halves:
    """The programs of a speculator whose halves are on these meshes; `text` is its state without target's and drafter's."""
    there, here = held(target, "target"), held(drafter, "drafter")

    def propose(params, own, text: SpecState):
        return here(spec.propose(params, text._replace(drafter=own)))

    def verify(params, cache, text: SpecState, draft: Draft):
        following, judgement = spec.score_verify(params, text._replace(target=cache), draft)
        return there((following._replace(target=()), following.target, judgement._replace(scores=None)))

    def meanwhile(params, own):
        return here(spec.meanwhile(params, own))

    def close(params, own, stats, draft: Draft, judgement: Judgement, start: Array):
        stats = fold(stats, told(draft, judgement, start, own))
        return here((spec.commit(params, own, judgement), stats))

    jitted = lambda program, *consumed: jax.jit(program, donate_argnums=consumed)
    return Halves(jitted(propose, 1), jitted(verify, 1), jitted(meanwhile, 1), jitted(close, 1, 2))
