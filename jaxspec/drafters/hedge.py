"""Several language models, and each row drafts with the one that the target has agreed with most: Hedge, full information.

An emitted token says of every drafter how likely it would have been accepted, whoever drafted. So all of them read what was
emitted, in windows that wait until they are full; that costs no target call, and leaves their caches ready for a switch.
Sources: Not-a-Bandit (HedgeSpec), https://arxiv.org/abs/2510.20064; fixed share, which follows a text from task to task:
Herbster and Warmuth, Tracking the Best Expert, Machine Learning 32 (1998).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxspec.drafters.lm import chain
from jaxspec.recording import place
from jaxspec.sampling import log_probs
from jaxspec.transformer import Cache, LMConfig, extend, prefill, unembed
from jaxspec.types import Drafter, Prompt

RATE = 1.0  # nats of log weight that a token costs the drafter that had no chance with it
SHARE = 0.01  # of the weight, that each token hands out evenly: so much a switch of task is expected


class HedgedState(NamedTuple):
    """What a row needs to draft with one of D drafters, and to judge them all.

    active: the cache of the drafter that the row has, `[B, S, ...]`; caches: of all of them, `[B, D, S, ...]`, which hold
        the row up to the token before `scored`.
    length: `[B]` tokens of the row; scored: `[B]` how many of them the drafters have been judged by, the prompt among them.
    log_p: `[B, M]` the target's log probability of each token emitted since.
    log_weights: `[B, D]`; choice: `[B]` the drafter that drafts.
    """

    active: Cache
    caches: Cache
    length: Array
    scored: Array
    log_p: Array
    log_weights: Array
    choice: Array


def hedged(
    config: LMConfig,
    num_speculative_tokens: int,
    num_drafters: int,
    *,
    window: int = 0,
    rate: float = RATE,
    share: float = SHARE,
    vocab_size: int | None = None,
    dtype: Any = jnp.float32,
) -> Drafter:
    """Drafts chains with D models of one shape; its parameters are their weights, stacked `[D, ...]`.

    A prompt's route is its prior: that drafter, the last of them for -1, has half of the weight and the others share the
    rest. The text then depends on the weights only as it depends on any drafter: not at all when greedy or under Gumbel
    coupling, not in law under p/q rejection.

    Args:
        window: M, tokens that the drafters read and are judged by at once, from W on and at most what the buffers have
            as slack; 0 is W, which judges every round.
        rate, share: see `reweighed`.
        vocab_size: the target's, where the two are padded differently.
    """
    width = max(window, num_speculative_tokens + 1)

    def init(weights: dict, prompt: Prompt, slots: int) -> HedgedState:
        read = lambda own: prefill(config, own, prompt.tokens, prompt.length, slots, dtype)[1]
        caches = _rows_first(jax.lax.map(read, weights))
        choice = jnp.asarray(prompt.route % num_drafters, jnp.int32)
        length = jnp.asarray(prompt.length)
        log_p = jnp.zeros((len(length), width), jnp.float32)
        return HedgedState(_of_row(caches, choice), caches, length, length, log_p, prior(choice, num_drafters), choice)

    def judge(weights: dict, state: HedgedState, tokens, sampling, due) -> HedgedState:
        start = jnp.maximum(state.scored - 1, 0)
        text = jax.vmap(lambda row, at: jax.lax.dynamic_slice(row, (at,), (width + 1,)))(tokens, start)

        def read(drafter):
            own, cache = drafter
            hidden, cache = extend(config, own, cache, text[:, :-1], start)
            log_q = log_probs(unembed(config, own, hidden, vocab_size), sampling)
            return jnp.take_along_axis(log_q, text[:, 1:, None], axis=-1)[..., 0], cache

        log_q, caches = jax.lax.map(read, (weights, _drafters_first(state.caches)))
        caches, number = _rows_first(caches), state.length - state.scored
        real = (jnp.arange(width) < number[:, None])[:, None]
        loss = jnp.where(real, rejected(state.log_p[:, None], jnp.moveaxis(log_q, 0, 1)), 0.0).sum(-1)
        log_weights = reweighed(state.log_weights, loss, number, rate=rate, share=share)
        choice = leader(log_weights, state.choice)
        judged = HedgedState(
            _of_row(caches, choice), caches, state.length, state.length, state.log_p, log_weights, choice
        )
        pick = lambda new, old: jnp.where(due.reshape(-1, *[1] * (new.ndim - 1)), new, old)
        # What a row that is not due has cached past `scored` is written again before it is read.
        return jax.tree.map(pick, judged._replace(caches=()), state._replace(caches=()))._replace(caches=caches)

    def propose(weights: dict, state: HedgedState, tokens, length, noise, sampling):
        due = state.length - state.scored + num_speculative_tokens + 1 > width
        state = jax.lax.cond(
            due.any(), lambda state: judge(weights, state, tokens, sampling, due), lambda state: state, state
        )
        read, say = _model(config, weights, state.choice, vocab_size)
        draft, cache = chain(read, say, num_speculative_tokens, state.active, tokens, length, noise, sampling)
        return draft, state._replace(active=cache)

    def commit(weights, state: HedgedState, verdict, scores) -> HedgedState:
        del weights
        row = jnp.arange(verdict.tokens.shape[0])[:, None]
        real = jnp.arange(verdict.tokens.shape[1]) < verdict.num_emitted[:, None]
        emitted = scores.log_p[row, verdict.path, verdict.tokens]
        log_p = place(state.log_p, emitted, state.length - state.scored, real)
        return state._replace(log_p=log_p, length=state.length + verdict.num_emitted)

    return Drafter(num_speculative_tokens, init, propose, commit, num_speculative_tokens)


def prior(choice: Array, num_drafters: int) -> Array:
    """Log weights `[B, D]` of which half lies on `choice [B]`, the other half on all others."""
    own = jax.nn.one_hot(choice, num_drafters, dtype=bool)
    return jax.nn.log_softmax(jnp.where(own, jnp.log(max(num_drafters - 1.0, 1.0)), 0.0), axis=-1)


def rejected(log_p: Array, log_q: Array) -> Array:
    """How unlikely a drafter's token was accepted where the target emitted one: 1 - min(1, q / p) of that token.

    The token is drawn from p, so the mean of this is the rejection rate 1 - sum(min(p, q)); it needs one number a token of
    each, where the sum needs V. For greedy rows it is 1 where the drafter's best token is another.
    """
    return 1.0 - jnp.exp(jnp.minimum(log_q - log_p, 0.0))


def reweighed(log_weights: Array, loss: Array, number: Array, *, rate: float, share: float) -> Array:
    """Hedge with fixed share over `number [B]` tokens: log weights `[B, D]`, which sum to one.

    Args:
        loss: `[B, D]` sums over the tokens, each token's between 0 and 1.
        rate: nats a unit of loss.
        share: part of the weight that each token hands out evenly.
    """
    kept = jax.nn.log_softmax(log_weights - rate * loss, axis=-1)
    moved = 1.0 - (1.0 - share) ** number[:, None].astype(jnp.float32)
    return jnp.logaddexp(jnp.log1p(-moved) + kept, jnp.log(moved / log_weights.shape[1]))


def leader(log_weights: Array, choice: Array) -> Array:
    """`[B]` the heaviest drafter; the one that the row has stays where none is heavier."""
    own = jnp.take_along_axis(log_weights, choice[:, None], axis=1)[:, 0]
    best = jnp.argmax(log_weights, axis=1).astype(choice.dtype)
    return jnp.where(log_weights.max(axis=1) > own, best, choice)


def _model(config: LMConfig, weights: dict, choice: Array, vocab_size: int | None):
    """`read` and `say` of `chain` for rows that have each the weights of their own choice."""
    if len(choice) == 1:
        own = jax.tree.map(lambda leaf: leaf[choice[0]], weights)
        read = lambda cache, window, start: extend(config, own, cache, window, start)
        return read, lambda hidden: unembed(config, own, hidden, vocab_size)
    rows = jax.tree.map(lambda leaf: leaf[choice], weights)

    def read_row(own, cache, window, start):
        hidden, cache = extend(config, own, jax.tree.map(lambda x: x[None], cache), window[None], start[None])
        return hidden[0], jax.tree.map(lambda x: x[0], cache)

    read = lambda cache, window, start: jax.vmap(read_row)(rows, cache, window, start)
    say_row = lambda own, hidden: unembed(config, own, hidden, vocab_size)
    return read, lambda hidden: jax.vmap(say_row)(rows, hidden)


def _of_row(caches: Cache, choice: Array) -> Cache:
    return jax.tree.map(lambda leaf: leaf[jnp.arange(len(choice)), choice], caches)


def _rows_first(caches: Cache) -> Cache:
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), caches)


def _drafters_first(caches: Cache) -> Cache:
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), caches)
