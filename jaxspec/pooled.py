"""Engines that decode with a pool, one for each way of drafting; who drafts is said by `serving`."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from jax.sharding import Mesh

from jaxspec import recording, verify
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
from jaxspec.engine import Engine
from jaxspec.prepared import dtype_of, few, target_in_blocks
from jaxspec.requests import MAX_DRAFT
from jaxspec.sharding import over
from jaxspec.store.families import NGRAM, TABLES, WITHOUT_WEIGHTS, companion, parameters
from jaxspec.store.features import Learnt
from jaxspec.store.pool import Pool
from jaxspec.target import lm_target
from jaxspec.transformer import least_columns
from jaxspec.types import Drafter

LEVELS, BEAM = 6, 4  # of a tree of trigram tables
WINDOW = 10  # tokens of a row that all drafters are judged by at once
SEVERAL = {
    "greedy-drafts": ("greedy-drafts", "greedy-drafts"),
    "recursive": ("without-replacement", "recursive"),
    "recursive-with-replacement": ("with-replacement", "recursive"),
    "k-seq": ("with-replacement", "k-seq"),
}
"""Ways of trying several drafts of one token: the scheme that draws them, and a rule of `verify.RULES` that is exact for it."""


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
    further = [(verify.RULES[_rule_of(name, rule)], _drafters(pool, name, lengths)) for name, lengths in others]
    return speculative(pool, max(own), rule, shorter=own, further=further, **shape)


def _drafters(pool: Pool, name: str, lengths: Sequence[int]) -> dict[int, Drafter]:
    """A further family's drafters by length."""
    if name in WITHOUT_WEIGHTS:
        parameters(pool, name)  # refuses those that are others than were measured
        return {k: without_weights(name, k) for k in lengths}
    config = companion(pool, name).pair.draft.config
    return {k: lm_drafter(config, k, **_settings(pool)) for k in lengths}


def without_weights(name: str, num_nodes: int) -> Drafter:
    """The drafter of a family of `WITHOUT_WEIGHTS`; fewer nodes are the first ones of more."""
    return ngram_drafter(num_nodes) if name == NGRAM else _of_tables(num_nodes)


def _of_tables(num_nodes: int, depth: int = LEVELS, beam: int = BEAM) -> Drafter:
    return adaptive_drafter(num_nodes, depth=min(depth, num_nodes), beam=beam)


def _rule_of(name: str, rule: str) -> str:
    """The rule of a family. What tables draft is not drawn: Gumbel coupling accepts as much, and texts know no tables."""
    return "gumbel" if name == TABLES and rule == "rejection" else rule


def alone(pool: Pool, name: str, num_nodes: int, rule: str = "greedy", **shape: Any) -> Engine:
    """Speculative decoding with a family of `WITHOUT_WEIGHTS` for every prompt, as `choosing` has it."""
    return _engine(pool, without_weights(name, num_nodes), _rule_of(name, rule), **shape)


def adapting(
    pool: Pool, num_nodes: int, rule: str = "greedy", *, depth: int = LEVELS, beam: int = BEAM, **shape: Any
) -> Engine:
    """Speculative decoding with token trees of trigram tables, see `drafters.adaptive`; `room` as of `branching`.

    Args:
        depth: levels, if there are nodes for so many.
    """
    if num_nodes == 0:
        return autoregressive(pool, idle_width(), rule, **shape)
    return _engine(pool, _of_tables(num_nodes, depth, beam), rule, **shape)


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
        settings["attend"] = fastest(meshes[1].size > 1, dtype_of(pool))
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
    settings = {"vocab_size": pair.vocab_size, "dtype": dtype_of(pool), "window": min(window, MAX_DRAFT + 1)}
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


def _engine(pool: Pool, drafter: Drafter, rule: str, make: Callable[..., Engine] = Engine, **shape: Any) -> Engine:
    pair = pool.pair
    target = lm_target(pair.target.config, dtype_of(pool), attend=_attend(pool))
    known = {"stop_tokens": pair.stop_tokens, "vocab_size": pair.vocab_size, "prefill_params": pair.target.params}
    plain = pair.target.params
    narrow = few(plain, shape["slots"], drafter.num_nodes + 1)
    params = target_in_blocks(pair.target) if narrow else plain
    return make(target, drafter, verify.RULES[rule], params, placement=over(pool.mesh), **known, **shape)


def _settings(pool: Pool) -> dict[str, Any]:
    """What all LM drafters of a pool are made with."""
    return {"vocab_size": pool.pair.vocab_size, "dtype": dtype_of(pool), "attend": _attend(pool)}


def _attend(pool: Pool) -> Attend:
    return fastest(pool.mesh is not None and pool.mesh.size > 1, dtype_of(pool))
