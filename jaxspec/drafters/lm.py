"""A smaller language model as the drafter, with one low-rank adapter a row."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxspec.adapters import Adapter, Bank, Stacked, Whole, select
from jaxspec.attention import Attend, dense
from jaxspec.sampling import draw, log_probs
from jaxspec.transformer import Cache, LMConfig, extend, least_columns, prefill, unembed
from jaxspec.types import Draft, Drafter, Prompt


class LMDrafterParams(NamedTuple):
    """Base weights and the bank; None when the weights are merged already, Stacked when they hold all merged ones.

    Of a bank of whole specialists the last are the base's, see `adapters.with_base`.
    """

    weights: dict
    bank: Bank | Stacked | None = None


class LMDrafterState(NamedTuple):
    """Cache, its valid length `[B]`, and the rows' own adapters, gathered once a request, or only their routes."""

    cache: Cache
    length: Array
    adapter: Adapter | None


class Branches(NamedTuple):
    """Which slots the rows of a window see, and where they stand: `depth`, `visible` and `origin` of `transformer.extend`."""

    depth: Array
    visible: Array
    origin: Array


def lm_drafter(
    config: LMConfig,
    num_speculative_tokens: int,
    *,
    vocab_size: int | None = None,
    dtype: Any = jnp.float32,
    attend: Attend = dense,
) -> Drafter:
    """Drafts a chain with a language model; `vocab_size` is the target's, where the two are padded differently."""

    def init(params: LMDrafterParams, prompt: Prompt, slots: int) -> LMDrafterState:
        return begin(config, params, prompt, slots, dtype)

    def propose(params: LMDrafterParams, state: LMDrafterState, tokens, length, noise, sampling):
        read, say = model(config, params, state.adapter, vocab_size=vocab_size, attend=attend)
        draft, cache = chain(read, say, num_speculative_tokens, state.cache, tokens, length, noise, sampling)
        return draft, state._replace(cache=cache)

    def commit(params, state: LMDrafterState, verdict, scores):
        del params, scores
        return state._replace(length=state.length + verdict.num_emitted)

    return Drafter(num_speculative_tokens, init, propose, commit, num_speculative_tokens)


def begin(config: LMConfig, params: LMDrafterParams, prompt: Prompt, slots: int, dtype: Any) -> LMDrafterState:
    """Reads the prompts, each row with its own adapter, into caches of `slots` positions."""
    adapter = None if params.bank is None else select(params.bank, prompt.route)
    read = lambda weights, own, *rows: prefill(config, weights, *rows, slots=slots, dtype=dtype, adapter=own)[1]
    cache = _by_row(read, params, adapter, prompt.tokens, prompt.length)
    return LMDrafterState(cache, prompt.length, adapter)


def model(
    config: LMConfig,
    params: LMDrafterParams,
    adapter: Adapter | None,
    *,
    vocab_size: int | None = None,
    attend: Attend = dense,
) -> tuple[Callable, Callable]:
    """`read` and `say` of `chain`, each row with its own adapter; `read` takes `Branches` too, where a window is no chain."""

    def one(weights, own, cache: Cache, window: Array, start: Array, branches: Branches | None):
        tree = {} if branches is None else branches._asdict()
        return extend(config, weights, cache, window, start, adapter=own, attend=attend, **tree)

    read = lambda cache, window, start, branches=None: _by_row(one, params, adapter, cache, window, start, branches)

    logits = lambda weights, _, hidden: unembed(config, weights, hidden, vocab_size)
    return read, lambda hidden: _by_row(logits, params, adapter, hidden)


def opening(read: Callable, cache: Cache, tokens: Array, length: Array, columns: int = 2) -> tuple[Array, Cache]:
    """What the model makes of a row's last token, `[B, H]`, and the cache with the last `columns` tokens in it.

    After a round whose last token but one was drafted and never read, that one is not cached yet; otherwise it is written
    again with what it was. More columns are for drafters that have not read, as it stands, the path that was accepted.
    """
    start = jnp.maximum(length - columns, 0)
    end = jax.vmap(lambda row, at: jax.lax.dynamic_slice(row, (at,), (columns,)))(tokens, start)
    hidden, cache = read(cache, end, start)
    return jnp.take_along_axis(hidden, (length - 1 - start)[:, None, None], axis=1)[:, 0], cache


def chain(
    read: Callable, say: Callable, number: int, cache: Cache, tokens: Array, length: Array, noise, sampling
) -> tuple[Draft, Cache]:
    """Drafts `number` tokens one after another: the draft, and the cache with them in it.

    Args:
        read, say: as of `model`.
    """
    choose = drawing(say, noise, sampling)
    (drafted, log_q), cache = follow(read, choose, number, cache, tokens, length)
    return Draft(drafted, jnp.full(length.shape, number, jnp.int32), log_q), cache


def drawing(say: Callable, noise, sampling) -> Callable:
    """`choose` of `follow` for one draft of every place: the token, and with it the distribution that it was drawn from."""

    def choose(hidden: Array, step: Array) -> tuple[Array, Any]:
        log_q = log_probs(say(hidden), sampling)
        if sampling is None:
            token = jnp.argmax(log_q, axis=-1).astype(jnp.int32)
            return token, (token, None)
        token = jax.vmap(draw)(noise(step), log_q).astype(jnp.int32)
        return token, (token, log_q)

    return choose


def follow(
    read: Callable, choose: Callable, number: int, cache: Cache, tokens: Array, length: Array
) -> tuple[Any, Cache]:
    """Reads on from a text along the tokens that `choose` goes on with: what it said `[B, number, ...]`, and the cache.

    The round opens with a window of the last two tokens, see `opening`. So commit only counts, and K tokens cost K calls.
    Where two columns are cheaper than one, a call reads the token before its own again, too.

    Args:
        read: (cache, window `[B, T]`, start `[B]`) -> hidden states `[B, T, H]` and the cache, as `transformer.extend`.
        choose: (hidden states `[B, H]`, step) -> the token `[B]` that is read next, and a tree of what is said.
    """

    columns = least_columns(len(tokens))

    def go_on(carry, step):
        cache, before, token, at = carry
        window = jnp.stack([before, token], axis=1)[:, -columns:]
        hidden, cache = read(cache, window, at + 1 - columns)
        following, said = choose(hidden[:, -1], step)
        return (cache, token, following, at + 1), said

    last, cache = opening(read, cache, tokens, length)
    token, said = choose(last, 0)
    before = jnp.take_along_axis(tokens, length[:, None] - 1, axis=1)[:, 0]
    (cache, *_), rest = jax.lax.scan(go_on, (cache, before, token, length), jnp.arange(1, number))
    put = lambda first, others: jnp.moveaxis(jnp.concatenate([first[None], others]), 0, 1)
    return jax.tree.map(put, said, rest), cache


def _by_row(function: Callable, params: LMDrafterParams, adapter: Adapter | None, *rows: Any) -> Any:
    """`function(weights, adapter, *rows)`; where rows have whole weights of their own, one row at a time under vmap."""
    if not isinstance(adapter, Whole):
        return function(params.weights, adapter, *rows)
    alone = lambda tree: jax.tree.map(lambda leaf: leaf[None], tree)
    one = lambda weights, *own: jax.tree.map(lambda leaf: leaf[0], function(weights, None, *alone(own)))
    return jax.vmap(one)(adapter.weights, *rows)
