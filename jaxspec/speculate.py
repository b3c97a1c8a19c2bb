"""The step: propose, score, verify, commit; and the loop around it.

Speculative decoding is a Markov kernel, `state, info = step(params, state)`: state is fed back, info never is. One
step serves several drivers; `run` is the one that stays on the device until every row has ended. Its halves, the drafter's
and the target's, are there for drivers that run them side by side.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxspec.sampling import DRAFT
from jaxspec.types import (
    Draft,
    Drafter,
    Judgement,
    Prompt,
    Rule,
    SpecInfo,
    SpecParams,
    SpecState,
    Speculator,
    Target,
    Verdict,
)
from jaxspec.verify import places, walk, window_noise


def speculator(target: Target, drafter: Drafter, rule: Rule, *, stop_tokens: Sequence[int]) -> Speculator:
    """Composes a target, a drafter and an acceptance rule into one pure step.

    Args:
        rule: what is kept of a draft, see `jaxspec.verify`.
        stop_tokens: token ids that end a row; the stop token itself is emitted.
    """
    stops = jnp.asarray(tuple(stop_tokens), jnp.int32)

    def init(params: SpecParams, prompt: Prompt, target_state, sampling, slots: int) -> SpecState:
        batch, bucket = prompt.tokens.shape
        real = jnp.arange(bucket) < prompt.length[:, None]
        tokens = jnp.pad(jnp.where(real, prompt.tokens, 0), ((0, 0), (0, slots - bucket)))
        none = jnp.zeros(batch, bool)
        return SpecState(
            tokens=tokens.astype(jnp.int32),
            length=prompt.length,
            stop_length=prompt.length + prompt.limit,
            done=prompt.limit <= 0,
            stopped=none,
            key=prompt.key,
            draft_limit=prompt.draft_limit,
            sampling=sampling,
            target=target_state,
            drafter=drafter.init(params.drafter, prompt, slots),
        )

    def propose(params, state: SpecState) -> tuple[Draft, Any]:
        with jax.named_scope("propose"):
            noise = _noise(rule, state)
            draft, own = drafter.propose(params, state.drafter, state.tokens, state.length, noise, state.sampling)
            allowed = jnp.where(state.done, 0, state.draft_limit)
            return draft._replace(num_drafted=jnp.minimum(draft.num_drafted, allowed)), own

    def score_verify(params, state: SpecState, draft: Draft) -> tuple[SpecState, Judgement]:
        last = jnp.take_along_axis(state.tokens, state.length[:, None] - 1, axis=1)
        with jax.named_scope("score"):
            window = jnp.concatenate([last, draft.tokens], axis=1)
            scores, own = target.score(params, state.target, window, draft.parents, state.sampling)
        with jax.named_scope("verify"):
            full = _verify(rule, state, draft, scores.log_p)
            verdict, stopped = _cut(full, state, stops)
        with jax.named_scope("commit"):
            own = target.commit(own, verdict, draft.parents)
            following = _emit(state, verdict, stopped)._replace(target=own)
        return following, Judgement(scores, verdict, jnp.where(state.done, 0, full.num_accepted))

    def commit(params, own, judgement: Judgement) -> Any:
        with jax.named_scope("commit"):
            return drafter.commit(params, own, judgement.verdict, judgement.scores)

    def step(params: SpecParams, state: SpecState) -> tuple[SpecState, SpecInfo]:
        draft, own = propose(params.drafter, state)
        following, judgement = score_verify(params.target, state, draft)
        with jax.named_scope("propose"):
            own = drafter.meanwhile(params.drafter, own)
        info = told(draft, judgement, state.length, own)
        return following._replace(drafter=commit(params.drafter, own, judgement)), info

    return Speculator(drafter.num_nodes, init, step, propose, drafter.meanwhile, score_verify, commit)


def told(draft: Draft, judgement: Judgement, start: Array, own: Any) -> SpecInfo:
    """The info of a round that began at length `start [B]`; `own` is the drafter's state as the verdict found it."""
    scores, verdict, accepted = judgement
    return SpecInfo(draft, scores, verdict, start, jax.vmap(places)(draft), accepted, own)


def any_running(state: SpecState, stats: Any) -> Array:
    """Whether a row has not ended."""
    del stats
    return ~jnp.all(state.done)


def run(
    step: Callable,
    fold: Callable[[Any, SpecInfo], Any],
    params: SpecParams,
    state: SpecState,
    stats: Any,
    go_on: Callable[[SpecState, Any], Array] = any_running,
) -> tuple[SpecState, Any]:
    """Repeats `step` on the device while `go_on(state, stats)`, folding each round's info into `stats`."""

    def body(carry):
        state, stats = carry
        state, info = step(params, state)
        return state, fold(stats, info)

    return jax.lax.while_loop(lambda carry: go_on(*carry), body, (state, stats))


def _noise(rule: Rule, state: SpecState) -> Callable[[Array], Array]:
    """What a drafter draws with: step -> `[B]` keys."""
    of_row = lambda key, start, step: rule.noise(key, start, DRAFT, step, step)
    return lambda step: jax.vmap(of_row, (0, 0, None))(state.key, state.length, step)


def _verify(rule: Rule, state: SpecState, draft: Draft, log_p: Array) -> Verdict:
    law = jax.vmap(rule.law)(draft, log_p)
    if state.sampling is None:
        return jax.vmap(lambda one, rows: walk(None, one, rows))(draft, law)
    noise = jax.vmap(lambda key, start, one: window_noise(rule, key, start, one))(state.key, state.length, draft)
    return jax.vmap(walk)(noise, draft, law)


def _cut(verdict: Verdict, state: SpecState, stops: Array) -> tuple[Verdict, Array]:
    """Ends a verdict at its first stop token or at the budget, whichever comes first, and finished rows at once."""
    width = verdict.tokens.shape[1]
    index = jnp.arange(width)
    emitted = jnp.minimum(verdict.num_emitted, state.stop_length - state.length)
    is_stop = (verdict.tokens[..., None] == stops).any(-1) & (index < emitted[:, None])
    stopped = is_stop.any(1) & ~state.done
    emitted = jnp.where(stopped, jnp.argmax(is_stop, axis=1) + 1, emitted).astype(jnp.int32)
    emitted = jnp.where(state.done, 0, emitted)
    accepted = jnp.minimum(verdict.num_accepted, emitted)
    return verdict._replace(num_emitted=emitted, num_accepted=accepted), stopped


def _emit(state: SpecState, verdict: Verdict, stopped: Array) -> SpecState:
    real = jnp.arange(verdict.tokens.shape[1]) < verdict.num_emitted[:, None]
    put = lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,))
    tokens = jax.vmap(put)(state.tokens, jnp.where(real, verdict.tokens, 0), state.length)
    length = state.length + verdict.num_emitted
    done = state.done | stopped | (length >= state.stop_length)
    return state._replace(tokens=tokens, length=length, done=done, stopped=state.stopped | stopped)
