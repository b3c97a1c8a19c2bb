"""A pool at work: engines that decode with it, and for each way of choosing a drafter the routes and the weights."""

import itertools
from collections.abc import Callable, Sequence
from functools import cache, lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from jaxspec import recording, router, shift, verify
from jaxspec.adapters import Bank, Stacked, Whole, stack, with_base
from jaxspec.apart_engine import ApartEngine
from jaxspec.attention import Attend, fastest
from jaxspec.drafters import (
    adaptive_drafter,
    cached_drafter,
    feature_drafter,
    graph_drafter,
    hedged,
    lm_drafter,
    merged_tree_drafter,
    multi_drafter,
    ngram_drafter,
    silent_drafter,
    tree_drafter,
)
from jaxspec.drafters.cached import outcomes
from jaxspec.drafters.feature import FeatureParams, tables_of
from jaxspec.drafters.lm import LMDrafterParams
from jaxspec.drafters.merged_trees import TwoDrafters
from jaxspec.engine import Engine, Method, Routes, unrouted
from jaxspec.experience import Experience
from jaxspec.joining import join, pays
from jaxspec.layouts import blocks_pay
from jaxspec.requests import MAX_DRAFT
from jaxspec.router import RouterParams
from jaxspec.sharding import over
from jaxspec.store.families import NGRAM, Options, companion, drafter_name
from jaxspec.store.features import Learnt
from jaxspec.store.huggingface import Model
from jaxspec.store.pool import Pool, measured_names
from jaxspec.target import lm_target
from jaxspec.transformer import NARROW, LMConfig, abstract, lay_out, least_columns
from jaxspec.types import Drafter

WIDE = 8  # columns of a window that is called wide
LOST = 1.5  # limits away from its task beyond which a prompt is taken for nobody's
LEVELS = 6  # of a tree of trigram tables
WINDOW = 10  # tokens of a row that all drafters are judged by at once
SEVERAL = {
    "greedy-drafts": ("greedy-drafts", "greedy-drafts"),
    "recursive": ("without-replacement", "recursive"),
    "recursive-with-replacement": ("with-replacement", "recursive"),
    "k-seq": ("with-replacement", "k-seq"),
}
"""Ways of trying several drafts of one token: the scheme that draws them, and a rule of `verify.RULES` that is exact for it."""
STACK = 1 << 28  # bytes of all tasks' kernels that an accelerator reads sooner than it launches more products


def speculative(
    pool: Pool, num_speculative_tokens: int, rule: str = "greedy", *, shorter: Sequence[int] = (), **shape: Any
) -> Engine:
    """Speculative decoding with an LM drafter; weights and routes are arguments of its programs.

    Args:
        num_speculative_tokens: drafted a round; 0 is autoregressive decoding.
        shorter: smaller numbers that, with one slot, some rows draft instead.
        rule: a name in `verify.RULES`; `greedy` decodes every row greedily.
        shape: `slots`, `room` and what else an `Engine` takes.
    """
    if num_speculative_tokens == 0:
        return autoregressive(pool, idle_width(), rule, **shape)
    pair = pool.pair
    lm = partial(lm_drafter, pair.draft.config, **_settings(pool))
    drafter = lm(num_speculative_tokens)
    fewer = {
        k: lm(k) if k else silent_drafter(idle_width() - 1, drafter.init) for k in shorter if k < num_speculative_tokens
    }
    return _engine(pool, drafter, rule, shorter=fewer, **shape)


def choosing(pool: Pool, families: Sequence[tuple[str, tuple[int, ...]]], rule: str = "greedy", **shape: Any) -> Engine:
    """Speculative decoding with drafters of these families at these lengths, see `Options`; the pool's own come first."""
    (_, own), *others = families
    further = [_drafters(pool, name, lengths) for name, lengths in others]
    return speculative(pool, max(own), rule, shorter=own, further=further, **shape)


def _drafters(pool: Pool, name: str, lengths: Sequence[int]) -> dict[int, Drafter]:
    """A further family's drafters by length."""
    if name == NGRAM:
        return {k: ngram_drafter(k) for k in lengths}
    config = companion(pool, name).pair.draft.config
    return {k: lm_drafter(config, k, **_settings(pool)) for k in lengths}


def looking_up(pool: Pool, num_speculative_tokens: int, rule: str = "greedy", **shape: Any) -> Engine:
    """Speculative decoding with what the text itself says, see `drafters.ngram`."""
    return _engine(pool, ngram_drafter(num_speculative_tokens), rule, **shape)


def adapting(
    pool: Pool, num_nodes: int, rule: str = "greedy", *, depth: int = LEVELS, beam: int = 4, **shape: Any
) -> Engine:
    """Speculative decoding with token trees of trigram tables, see `drafters.adaptive`; `room` as of `branching`.

    Args:
        depth: levels, if there are nodes for so many.
    """
    if num_nodes == 0:
        return autoregressive(pool, idle_width(), rule, **shape)
    depth = min(depth, num_nodes)
    return _engine(pool, adaptive_drafter(num_nodes, depth=depth, beam=beam), rule, **shape)


def several(
    pool: Pool, num_speculative_tokens: int, drafts: int, way: str, rule: str = "greedy", **shape: Any
) -> Engine:
    """Speculative decoding with so many drafts of every place, see `drafters.multi`; weights and routes are arguments.

    Args:
        way: a name in `SEVERAL`, whose own rule takes the place of `rejection`.
    """
    scheme, own = SEVERAL[way]
    drafter = multi_drafter(pool.pair.draft.config, num_speculative_tokens, drafts, scheme, **_settings(pool))
    return _engine(pool, drafter, own if rule == "rejection" else rule, **shape)


def branching(pool: Pool, num_nodes: int, rule: str = "greedy", *, depth: int, beam: int = 8, **shape: Any) -> Engine:
    """Speculative decoding with token trees of an LM drafter, see `drafters.tree`; the `room` must have slack for the nodes."""
    drafter = tree_drafter(pool.pair.draft.config, num_nodes, depth=depth, beam=beam, **_settings(pool))
    return _engine(pool, drafter, rule, **shape)


def reusing(
    pool: Pool, num_nodes: int, rule: str = "greedy", *, depth: int, beam: int = 8, ancestors: int = 1, **shape: Any
) -> Engine:
    """Speculative decoding with token graphs of an LM drafter, see `drafters.graph`; `room` as of `branching`."""
    settings = {"depth": depth, "beam": beam, "ancestors": ancestors, **_settings(pool)}
    return _engine(pool, graph_drafter(pool.pair.draft.config, num_nodes, **settings), rule, **shape)


def uniting(pool: Pool, num_nodes: int, rule: str = "greedy", *, depth: int, beam: int = 8, **shape: Any) -> Engine:
    """Speculative decoding with two drafters' trees as one, see `drafters.merged_trees`; for `beside_mixed` and `two_best`."""
    drafter = merged_tree_drafter(pool.pair.draft.config, num_nodes, depth=depth, beam=beam, **_settings(pool))
    return _engine(pool, drafter, rule, **shape)


def guessing(pool: Pool, own: Learnt, num_speculative_tokens: int, rule: str = "greedy", **shape: Any) -> Engine:
    """Speculative decoding with guesses of the target's features, see `drafters.feature`; for `featured`."""
    return _engine(pool, feature_drafter(own.config, num_speculative_tokens, **_settings(pool)), rule, **shape)


def querying(
    pool: Pool,
    num_speculative_tokens: int,
    rule: str = "greedy",
    *,
    layers: int,
    width: int,
    meshes: tuple[Mesh, Mesh] | None = None,
    **shape: Any,
) -> Engine:
    """Query and correct with an LM drafter, see `drafters.cached`.

    Args:
        meshes: the target's, which is the pool's, and the drafter's, which work at once; None, and both halves of a round run
            one after the other where the pool is.
    """
    settings: dict[str, Any] = _settings(pool) | {"layers": layers, "width": width}
    make: Callable[..., Engine] = Engine
    if meshes is not None:
        settings["attend"] = fastest(meshes[1].size > 1, _dtype(pool))
        make = partial(ApartEngine, meshes=meshes)
    drafter = cached_drafter(pool.pair.draft.config, num_speculative_tokens, **settings)
    return _engine(pool, drafter, rule, make, **{"recorder": outcomes(layers), **shape})


def online(
    pool: Pool, num_speculative_tokens: int, rule: str = "greedy", *, window: int = WINDOW, **shape: Any
) -> Engine:
    """Speculative decoding in which a row changes its drafter as it goes, see `drafters.hedge`; for `hedging`.

    Args:
        window: tokens that all drafters read and are judged by at once.
    """
    if num_speculative_tokens == 0:
        return autoregressive(pool, idle_width(), rule, **shape)
    pair, number = pool.pair, len(candidates(pool))
    settings = {"vocab_size": pair.vocab_size, "dtype": _dtype(pool), "window": min(window, MAX_DRAFT + 1)}
    drafter = hedged(pair.draft.config, num_speculative_tokens, number, **settings)
    return _engine(pool, drafter, rule, **{"recorder": recording.choices(number), **shape})


def candidates(pool: Pool) -> list[str]:
    """The drafters that rows change between, by their routes: the tasks' own, `mixed`, and last what adapters belong on."""
    return [*pool.tasks, "mixed", pool.names[-1]]


def idle_width() -> int:
    """Columns of a window in which nothing is drafted: two on accelerators, where one is slower."""
    return least_columns(1)


def autoregressive(pool: Pool, width: int, rule: str = "greedy", **shape: Any) -> Engine:
    """Autoregressive decoding through a window of `width` columns."""
    return _engine(pool, silent_drafter(width - 1), rule, **shape)


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
    target, weights = pool.pair.target, jax.tree.map(lambda leaf: leaf.astype(_dtype(pool)), own.weights)
    tables = tables_of(own.config, target.params)
    shared = tables["embed"]["embedding"] is target.params["embed"]["embedding"]
    model = laid(weights.decoder | tables, slots)
    source = _target_in_blocks(target) if shared and _few(target.params, slots) else model
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
        first = among.names.index(next(iter(pool.facts["further"][name]["acceptance_length"])))
        return () if name == NGRAM else adapted(companion(pool, name), slots)(routes - first)

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


@lru_cache(maxsize=4)
def adapted(pool: Pool, slots: int) -> Callable[[np.ndarray], LMDrafterParams]:
    """Routes -> drafter parameters: merged weights for one slot, which has one route, else the trunk and the bank."""

    @cache
    def merged(route: int) -> LMDrafterParams:
        return LMDrafterParams(jax.block_until_ready(laid(pool.weights(route), slots)))

    if slots == 1:
        return lambda routes: merged(int(routes[0]))
    every = banked(pool.pair.draft.config, pool.trunk, pool.bank, slots)
    return lambda routes: every


def banked(draft: LMConfig, trunk: dict, bank: Bank, slots: int) -> LMDrafterParams:
    """The trunk and all tasks' updates, as rows of many routes draft with them."""
    if isinstance(bank, Whole):
        return LMDrafterParams(trunk, with_base(trunk, bank))
    dtype = jax.tree.leaves(trunk)[0].dtype
    if stacks(draft, len(jax.tree.leaves(bank)[0]), dtype):
        return LMDrafterParams(stack(trunk, bank), Stacked())
    weights = _in_blocks(trunk, slots)  # adapters were merged into plain kernels, so the layout comes last
    return LMDrafterParams(weights, jax.tree.map(lambda x: x.astype(dtype), bank))


def stacks(draft: LMConfig, tasks: int, dtype: Any) -> bool:
    """Whether rows of many routes draft with all tasks' merged kernels side by side, not with adapters of their own."""
    kernels = abstract(draft, dtype)["layers"]
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kernels))
    return jax.default_backend() != "cpu" and (tasks + 1) * size <= STACK


def laid(weights: dict, slots: int) -> dict:
    """Weights as windows of so many slots want them: joined on a GPU, in blocks of columns on a CPU, where the rows are few."""
    return join(weights) if pays(weights) else _in_blocks(weights, slots)


def _in_blocks(weights: dict, slots: int) -> dict:
    return lay_out(weights) if _few(weights, slots) else weights


def _few(weights: dict, slots: int, width: int = 0) -> bool:
    """Whether weights are laid out for windows of so many slots, of at least WIDE columns."""
    alone = len(jax.tree.leaves(weights)[0].devices()) == 1
    narrow = alone and jax.default_backend() == "cpu" and slots * max(width, WIDE) <= NARROW
    return narrow and blocks_pay(weights)


@lru_cache(maxsize=4)
def _target_in_blocks(target: Model) -> dict:
    return lay_out(target.params)


def _engine(pool: Pool, drafter: Drafter, rule: str, make: Callable[..., Engine] = Engine, **shape: Any) -> Engine:
    pair = pool.pair
    target = lm_target(pair.target.config, _dtype(pool), attend=_attend(pool))
    known = {"stop_tokens": pair.stop_tokens, "vocab_size": pair.vocab_size, "prefill_params": pair.target.params}
    plain = pair.target.params
    few = _few(plain, shape["slots"], drafter.num_nodes + 1)
    params = _target_in_blocks(pair.target) if few else plain
    return make(target, drafter, verify.RULES[rule], params, placement=over(pool.mesh), **known, **shape)


def _dtype(pool: Pool):
    return jax.tree.leaves(pool.pair.target.params)[0].dtype


def _settings(pool: Pool) -> dict[str, Any]:
    """What all LM drafters of a pool are made with."""
    return {"vocab_size": pool.pair.vocab_size, "dtype": _dtype(pool), "attend": _attend(pool)}


def _attend(pool: Pool) -> Attend:
    return fastest(pool.mesh is not None and pool.mesh.size > 1, _dtype(pool))
