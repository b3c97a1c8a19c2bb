"""A pool at work: for each way of choosing a drafter, the routes of a batch and the parameters that draft for it."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import jax
import numpy as np

from jaxspec import router, verify
from jaxspec.adapters import Bank
from jaxspec.drafters import lm_drafter, silent_drafter
from jaxspec.drafters.lm import LMDrafterParams
from jaxspec.generate import BUCKETS, Decoder, Request, Timed, complete, decoder
from jaxspec.router import BASE
from jaxspec.store.pool import Pool
from jaxspec.target import lm_target
from jaxspec.transformer import NARROW, lay_out


class Method(NamedTuple):
    """One way of drafting with a pool.

    route: features `[B, H]`, rows -> routes `[B]`; drafter_params: routes -> parameters of the drafter.
    """

    name: str
    route: Callable[[np.ndarray, int], np.ndarray]
    drafter_params: Callable[[np.ndarray], object]


def prepared(pool: Pool, rows: int) -> Pool:
    """The pool for windows of `rows` rows in all: few rows on a CPU are decoded with kernels in blocks.

    Prompts are many rows, so the target's plain weights are kept for them and it takes its memory twice.
    """
    if rows > NARROW or jax.default_backend() != "cpu":
        return pool
    return pool._replace(laid_out=jax.block_until_ready(lay_out(pool.pair.target.params)))


def speculative(pool: Pool, num_speculative_tokens: int, *, sampled: bool) -> Decoder:
    """The programs of speculative decoding with an LM drafter; one pair for every route, weights are arguments."""
    pair, dtype = pool.pair, _dtype(pool)
    drafter = lm_drafter(pair.draft.config, num_speculative_tokens, vocab_size=pair.vocab_size, dtype=dtype)
    law = verify.rejection if sampled else verify.greedy
    return decoder(lm_target(pair.target.config, dtype), drafter, law, stop_tokens=pair.stop_tokens)


def autoregressive(pool: Pool, width: int, *, sampled: bool) -> Decoder:
    """The programs of autoregressive decoding through a window of `width` columns."""
    law = verify.rejection if sampled else verify.greedy
    target = lm_target(pool.pair.target.config, _dtype(pool))
    return decoder(target, silent_drafter(width - 1), law, stop_tokens=pool.pair.stop_tokens)


def answer(
    pool: Pool,
    programs: Decoder,
    method: Method,
    requests: Sequence[Request],
    *,
    batch: int,
    budget: int,
    smallest: int = BUCKETS[0],
) -> Timed:
    """Decodes one batch of one prompt bucket, from ids in host memory to ids in host memory."""
    return complete(
        programs,
        requests,
        target_params=pool.pair.target.params,
        decode_params=pool.laid_out,
        drafter_params=method.drafter_params,
        route=method.route,
        batch=batch,
        budget=budget,
        vocab_size=pool.pair.vocab_size,
        smallest=smallest,
    )


def unrouted(pool: Pool, name: str) -> Method:
    """`autoregressive`, `base` or `mixed`: the same drafter for every prompt."""
    weights = {"autoregressive": None, "base": pool.pair.draft.params, "mixed": pool.mixed}[name]
    params = () if weights is None else _drafting(pool, weights)
    return Method(name, lambda features, rows: np.full(len(features), BASE), lambda routes: params)


def given(pool: Pool, name: str, routes: Callable[[], np.ndarray]) -> Method:
    """Routes that were chosen beforehand: `oracle`, `random`, `wrong`, or what a request asked for."""
    return Method(name, lambda features, rows: _padded(routes(), len(features)), adapted(pool))


def routed(pool: Pool, on_routes: Callable[[np.ndarray, np.ndarray], None] | None = None) -> Method:
    """The router's own choice; `on_routes` hears each batch's routes and probabilities."""
    classify = jax.jit(router.probabilities)

    def route(features: np.ndarray, rows: int) -> np.ndarray:
        probability = np.asarray(classify(pool.router, features))
        routes = router.choose(probability, pool.facts["fallback_below"])
        if on_routes is not None:
            on_routes(routes[:rows], probability[:rows])
        return routes

    return Method("routed", route, adapted(pool))


def overridden(method: Method, forced: Sequence[int | None]) -> Method:
    """A method whose choice gives way where a request forces its route."""

    def route(features: np.ndarray, rows: int) -> np.ndarray:
        own = [free if wanted is None else wanted for free, wanted in zip(method.route(features, rows), forced)]
        return _padded(np.array(own), len(features))

    return method._replace(route=route)


def adapted(pool: Pool) -> Callable[[np.ndarray], LMDrafterParams]:
    """Routes -> drafter parameters: merged weights when all rows share a route, else base weights and the bank."""

    @cache
    def merged(task: int) -> LMDrafterParams:
        return _drafting(pool, pool.specialist(task))

    banked = _drafting(pool, pool.pair.draft.params, jax.tree.map(lambda x: x.astype(_dtype(pool)), pool.bank))
    return lambda routes: merged(int(routes[0])) if len(set(routes.tolist())) == 1 else banked


def _drafting(pool: Pool, weights: dict, bank: Bank | None = None) -> LMDrafterParams:
    # Adapters are merged into plain kernels, so the layout comes last.
    placed = weights if pool.laid_out is None else lay_out(weights)
    return LMDrafterParams(jax.block_until_ready(placed), bank)


def _padded(routes: np.ndarray, batch: int) -> np.ndarray:
    return np.concatenate([routes, np.full(batch - len(routes), routes[-1])])


def _dtype(pool: Pool):
    return jax.tree.leaves(pool.pair.target.params)[0].dtype
