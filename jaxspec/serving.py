"""A pool at work: for each way of choosing a drafter the routes of prompts, and the weights that draft for them."""

import itertools
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxspec import router, shift
from jaxspec.drafters.feature import FeatureParams, tables_of
from jaxspec.drafters.lm import LMDrafterParams
from jaxspec.drafters.merged_trees import TwoDrafters
from jaxspec.engine import Method, Routes, unrouted
from jaxspec.experience import Experience
from jaxspec.pooled import candidates
from jaxspec.prepared import adapted, dtype_of, few, laid, target_in_blocks
from jaxspec.router import RouterParams
from jaxspec.store.families import WITHOUT_WEIGHTS, Options, companion, drafter_name, parameters
from jaxspec.store.features import Learnt
from jaxspec.store.names import measured_names
from jaxspec.store.pool import Pool

LOST = 1.5  # limits away from its task beyond which a prompt is taken for nobody's


@lru_cache(maxsize=8)
def always(pool: Pool, name: str, slots: int) -> Method:
    """One without weights, `autoregressive`, `ngram` or `adaptive`, or the drafter of that name: the same for every prompt."""
    if name == "adaptive":
        params = pool.trigrams
    else:
        params = () if name in ("autoregressive", "ngram") else LMDrafterParams(laid(pool.drafter(name), slots))
    return Method(name, unrouted, lambda routes: params)


def featured(pool: Pool, own: Learnt, slots: int) -> Method:
    """The drafter of features for every prompt; it has the target's own tables, laid out as the target's are."""
    target, weights = pool.pair.target, jax.tree.map(lambda leaf: leaf.astype(dtype_of(pool)), own.weights)
    tables = tables_of(own.config, target.params)
    shared = tables["embed"]["embedding"] is target.params["embed"]["embedding"]
    model = laid(weights.decoder | tables, slots)
    source = target_in_blocks(target) if shared and few(target.params, slots) else model
    decoder = {name: model[name] for name in weights.decoder}
    params = FeatureParams(weights._replace(decoder=decoder), {name: source[name] for name in tables})
    return Method("feature", unrouted, lambda routes: params)


def given(pool: Pool, slots: int) -> Method:
    """The pool's specialists, for requests that name their route."""
    return Method("given", unrouted, adapted(pool, slots))


def routed(pool: Pool, slots: int) -> Method:
    """The drafter of the router's choice of task, where a request does not name its route."""
    return Method("routed", _of_task(pool), adapted(pool, slots))


def beside_mixed(pool: Pool, slots: int) -> Method:
    """As `routed`, and the mixed drafter with it."""
    own, mixed = routed(pool, slots), always(pool, "mixed", slots).drafter_params(np.array([router.TRUNK]))
    both = lambda routes: TwoDrafters(own.drafter_params(routes), mixed)
    return own._replace(name="merged-trees", drafter_params=both)


def two_best(pool: Pool, slots: int) -> Method:
    """The drafters of the router's first and second choice of task together; a route is a place in `pairs`."""
    both, own, best = pairs(pool), adapted(pool, slots), _choice_of_task(pool)
    table = jnp.asarray(both, jnp.int32)

    def choose(probability: np.ndarray, strangeness: np.ndarray) -> tuple[np.ndarray, None]:
        first, _ = best(probability, strangeness)
        second = router.runner_up(probability, np.array(pool.drafters), first)
        return (both == np.stack([first, second], axis=1)[:, None]).all(-1).argmax(-1), None

    def params(routes: np.ndarray) -> TwoDrafters:
        first, second = (own(each) for each in both[routes].T)
        return TwoDrafters(first, second, table)

    return Method("merged-trees-two-best", _classifier(pool, choose), params)


def pairs(pool: Pool) -> np.ndarray:
    """All pairs of the specialists and what adapters belong on, by their routes `[R, 2]`; the last, -1 too, is that twice."""
    routes = [*range(len(pool.tasks)), router.TRUNK]
    return np.array(list(itertools.product(routes, repeat=2)))


def _of_task(pool: Pool) -> Callable[[np.ndarray], Routes]:
    return _classifier(pool, _choice_of_task(pool))


def _choice_of_task(pool: Pool) -> Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, None]]:
    drafters = np.array([*pool.drafters, router.TRUNK])  # the last is that of no task

    def choose(probability: np.ndarray, strangeness: np.ndarray) -> tuple[np.ndarray, None]:
        del strangeness
        return drafters[router.choose(probability, pool.facts["fallback_below"])], None

    return choose


@lru_cache(maxsize=4)
def hedging(pool: Pool, slots: int) -> Method:
    """All of `candidates`; what `routed` would choose, or the request's own route, is where each row begins."""
    weights = [laid(pool.drafter(name), slots) for name in candidates(pool)]
    beside = jax.tree.map(lambda *leaves: jnp.stack(leaves), *weights)
    return Method("online", _of_task(pool), lambda routes: beside)


def inexperienced(pool: Pool) -> Experience:
    """What `hedging` learns from prompt to prompt, before the first."""
    return Experience(pool.drafters, len(candidates(pool)), pool.facts["fallback_below"])


def chosen(pool: Pool, slots: int, among: Options, *, bank: bool = False) -> Method:
    """Whichever of these drafters and draft lengths promises the most tokens per second.

    A prompt beyond the limit of what its task was learnt from is drafted for by mixed, and by the base far beyond it, or where
    the task is unsure. In several slots, whose rows draft with the bank, the trunk stands in for both.

    Several slots share the longest length. With one length the choice is the same for any number of slots, and rows draft
    with the bank, which the mixed drafter is no part of: where it promises more, it serves all rows, unless requests name
    drafters of the `bank`; rounds of a bank that take longer count against it.
    """
    alone, mixed, trunk = among.alone, len(pool.tasks), len(pool.names) - 1
    base = pool.names.index("base") if alone else trunk
    of_bank = [*range(mixed), trunk]
    share = np.array(pool.facts["sizes"]) / sum(pool.facts["sizes"])
    each = among.seconds[: trunk + 1, :, -1]
    united = not (alone or bank) and share @ each[mixed] <= among.apart * (share @ each[of_bank].min(0))
    drafters = [mixed] if united else np.flatnonzero(among.family >= 0).tolist() if alone else of_bank

    whom = drafters, [mixed] if alone or united else [base], [mixed] if united else [base]

    def best(of: list[int], probability: np.ndarray) -> np.ndarray:
        own, length = router.fastest(probability, among.seconds[of])
        return np.stack([np.array(of)[own], np.array(among.lengths)[length]])

    def choose(probability: np.ndarray, strangeness: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        unsure = (probability.max(-1) < pool.facts["fallback_below"]) | (strangeness > LOST)
        among_whom = np.where(unsure, 2, strangeness > 1)
        each = [best(whom[own], probability[i : i + 1]) for i, own in enumerate(among_whom)]
        drafter, k = np.concatenate(each, axis=1)
        return np.where((drafter == trunk) | (k == 0), router.TRUNK, drafter), k

    route = _classifier(pool, choose)
    if united:
        return always(pool, "mixed", slots)._replace(name="chosen", route=route)
    return Method(
        "chosen", route, _of_families(pool, slots, among), lambda own: int(among.family[own]) if own >= 0 else 0
    )


def outside(pool: Pool, route: int, slots: int, method: Method) -> Method:
    """A whole drafter for every row, whose bank has it not; what is said of the prompts is the method's."""
    return always(pool, drafter_name(pool.facts, route), slots)._replace(route=method.route)


def _of_families(pool: Pool, slots: int, among: Options) -> Callable[[np.ndarray], Any]:
    """Routes -> parameters of the drafters of their family."""
    own, number = adapted(pool, slots), len(measured_names(pool.facts))

    def params(routes: np.ndarray) -> Any:
        route = int(routes[0])
        if slots > 1 or route < number:
            return own(routes)
        name, _ = among.families[among.family[route]]
        if name in WITHOUT_WEIGHTS:
            return parameters(pool, name)
        first = among.names.index(next(iter(pool.facts["further"][name]["acceptance_length"])))
        return adapted(companion(pool, name), slots)(routes - first)

    return params


def _classifier(pool: Pool, choose: Callable) -> Callable[[np.ndarray], Routes]:
    """Features -> Routes; `choose` makes routes and draft lengths of the tasks' probabilities and of `shift.strangeness`.

    The features are on the host, and so is the router: an accelerator is asked in more time than a CPU takes to answer.
    """
    host = _host()
    there = lambda tree: jax.device_put(jax.tree.map(np.asarray, tree), host)
    params, normal, classify = there(pool.router), there(pool.normal), jax.jit(_classified)

    def route(features: np.ndarray) -> Routes:
        probability, strangeness = map(np.asarray, classify(params, normal, jax.device_put(features, host)))
        drafter, length = choose(probability, strangeness)
        return Routes(drafter, probability.argmax(-1), probability.max(-1), length)

    return route


def _classified(params: RouterParams, normal: shift.Normal | None, features: Array) -> tuple[Array, Array]:
    """Probabilities of the tasks `[B, T]`, and strangeness `[B]` to the likeliest; none where the pool does not say."""
    probability = router.probabilities(params, features)
    if normal is None:
        return probability, jnp.zeros(len(features))
    return probability, shift.strangeness(normal, router.standardised(params, features), probability.argmax(-1))


def _host() -> Any:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS may leave the CPU out
        return jax.local_devices()[0]
