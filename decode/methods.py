"""The methods of a bench, a row each: who drafts for which prompt, and the program that decodes it.

A method more is a row of `RECIPES`, its name in `store.names.METHODS`, and a row in the tests' table of laws. Methods without a
row are drafters that were added to a pool, which serve every prompt with the chains of `routed`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from decode import costs
from decode.figures import Ask
from decode.rivals import Contender
from decode.settings import Bench
from jaxspec import pooled, serving
from jaxspec.config import UserError
from jaxspec.drafters.adaptive import WIDEST
from jaxspec.drafters.beam import met
from jaxspec.engine import Engine, Method
from jaxspec.requests import MAX_DRAFT, MAX_NODES
from jaxspec.router import TRUNK
from jaxspec.store import features
from jaxspec.store.facts import draft_length
from jaxspec.store.families import NGRAM, Options, options
from jaxspec.store.names import FEATURE, MERGED, METHODS, ONLINE, TRIGRAMS, extra_file
from jaxspec.store.pool import Pool
from jaxspec.store.stages import MANIFEST


class Setting(NamedTuple):
    """What methods are made from: the bench's settings, a pool with its prompts, the acceptance rule, and an engine's shape."""

    config: Bench
    contender: Contender
    rule: str
    shape: dict[str, Any]

    @property
    def pool(self) -> Pool:
        return self.contender.pool

    @property
    def asks(self) -> Sequence[Ask]:
        return self.contender.asks

    @property
    def slots(self) -> int:
        return self.config.batch

    @property
    def length(self) -> int:
        """Tokens that a chain has in a round."""
        return draft_length(self.pool.facts, self.config.num_speculative_tokens, least=1, slots=self.slots)

    @property
    def among(self) -> Options:
        """What `chosen` may choose among."""
        return options(self.pool.facts, self.config.num_speculative_tokens, self.slots)


class Chosen(NamedTuple):
    """A way of choosing drafters.

    routes: each prompt's, for `random`, `oracle` and what begins `wrong`; reach: the routes that some prompt may take.
    """

    method: Method
    routes: np.ndarray | None = None
    reach: Sequence[int] = ()


class Recipe(NamedTuple):
    """How a method is made; methods of one `engine` share its programs.

    cost: what training it took, see `costs`; nodes: that a round verifies beyond those of a chain's slack; check: raises
    UserError for settings that it cannot have.
    """

    choose: Callable[[Setting], Chosen]
    engine: Callable[[Setting], Engine]
    cost: Callable[[Pool], costs.Cost | None]
    nodes: Callable[[Bench], int] = lambda config: 0
    check: Callable[[Bench], None] = lambda config: None


def choosing(setting: Setting) -> dict[str, Chosen]:
    """A pool's ways of choosing drafters, by the methods' own names."""
    return {name: recipe(name).choose(setting) for name in setting.contender.methods}


def engines(setting: Setting) -> dict[str, Engine]:
    """A pool's methods' programs, at its own draft length, by the methods' own names."""
    wanted = {name: recipe(name).engine for name in setting.contender.methods}
    made = {make: make(setting) for make in dict.fromkeys(wanted.values())}
    return {name: made[make] for name, make in wanted.items()}


def recipe(method: str) -> Recipe:
    """A method's, a rival's or not."""
    name = method.rpartition("/")[2]
    return RECIPES.get(name, Recipe(partial(_always, name), _chains, partial(costs.added, name)))


def trained(setting: Setting) -> dict[str, costs.Cost | None]:
    """What a pool's methods took to train, by their own names."""
    return {name: recipe(name).cost(setting.pool) for name in setting.contender.methods}


def expanded(methods: Sequence[str], pool: Path) -> tuple[str, ...]:
    """The methods asked for, `all` being those that the pool has; says which it lacks and how to make them."""
    if "all" not in methods:
        return tuple(methods)
    missing = {name: "train.extras" for name in MERGED if not extra_file(pool, name).exists()}
    if not any((pool / FEATURE).glob(f"*/{MANIFEST}")):
        missing[FEATURE] = "train.feature"
    for name, command in missing.items():
        print(f"bench: the pool has no {name}; `python -m {command}` makes it")
    if not (pool / TRIGRAMS).exists():
        print("bench: adaptive begins with an empty table; `python -m train.extras` counts one")
    return tuple(dict.fromkeys([*(name for name in ALL if name not in missing), *(m for m in methods if m != "all")]))


def most_nodes(config: Bench) -> int:
    """The most nodes beyond a chain's that a round of any method verifies, for which slots need room."""
    return max((recipe(method).nodes(config) for method in config.methods), default=0)


def check(config: Bench) -> None:
    """Raises UserError where a method cannot have the settings."""
    for method in config.methods:
        recipe(method).check(config)


def _always(name: str, setting: Setting) -> Chosen:
    return Chosen(serving.always(setting.pool, name, setting.slots))


def _routed(setting: Setting) -> Chosen:
    return Chosen(serving.routed(setting.pool, setting.slots), reach=_reach(setting, len(setting.pool.names)))


def _fastest(setting: Setting) -> Chosen:
    among = setting.among
    return Chosen(serving.chosen(setting.pool, setting.slots, among), reach=_reach(setting, len(among.names)))


def _reach(setting: Setting, number: int) -> list[int]:
    """Of so many routes those that some prompt may take."""
    family = setting.among.family
    return [route for route in range(TRUNK, number) if route < 0 or family[route] >= 0]


def _beside_mixed(setting: Setting) -> Chosen:
    return _routed(setting)._replace(method=serving.beside_mixed(setting.pool, setting.slots))


def _two_best(setting: Setting) -> Chosen:
    both = serving.pairs(setting.pool)
    alike = np.flatnonzero(both[:, 0] == both[:, 1]).tolist()  # with which all weights are read
    return Chosen(serving.two_best(setting.pool, setting.slots), reach=alike)


def _beforehand(which: str, setting: Setting) -> Chosen:
    routes = _routes(setting)[which]
    return Chosen(serving.given(setting.pool, setting.slots), routes, np.unique(routes).tolist())


def _online(begins: str | None, setting: Setting) -> Chosen:
    return Chosen(serving.hedging(setting.pool, setting.slots), _routes(setting)[begins] if begins else None)


def _routes(setting: Setting) -> dict[str, np.ndarray]:
    """Routes that are chosen without looking at a prompt: by chance, by its label, and against it."""
    pool, number = setting.pool, len(setting.asks)
    tasks, rng = len(pool.tasks), np.random.default_rng(setting.config.seed)
    random = rng.integers(tasks, size=number)
    own = np.array([ask.cluster for ask in setting.asks])
    wrong = np.where(tasks > 1, (own + rng.integers(1, max(tasks, 2), size=number)) % tasks, TRUNK)
    return {"random": random, "wrong": wrong, "oracle": np.array([*pool.drafters, TRUNK])[own]}


def _chains(setting: Setting) -> Engine:
    return pooled.speculative(setting.pool, setting.length, setting.rule, **setting.shape)


def _families(setting: Setting) -> Engine:
    return pooled.choosing(setting.pool, setting.among.families, setting.rule, **setting.shape)


def _lookups(setting: Setting) -> Engine:
    return pooled.alone(setting.pool, NGRAM, setting.length, setting.rule, **setting.shape)


def _hedges(setting: Setting) -> Engine:
    return pooled.online(setting.pool, setting.length, setting.rule, **setting.shape)


def _trees(setting: Setting) -> Engine:
    of = setting.config
    return pooled.branching(setting.pool, of.nodes, setting.rule, depth=of.depth, beam=of.beam, **setting.shape)


def _graphs(setting: Setting) -> Engine:
    of, tree = setting.config, {"depth": setting.config.depth, "beam": setting.config.beam}
    return pooled.reusing(setting.pool, of.nodes, setting.rule, ancestors=of.ancestors, **tree, **setting.shape)


def _merged_trees(setting: Setting) -> Engine:
    of = setting.config
    return pooled.uniting(setting.pool, of.nodes, setting.rule, depth=of.depth, beam=of.beam, **setting.shape)


def _tables(setting: Setting) -> Engine:
    of = setting.config
    return pooled.adapting(setting.pool, of.nodes, setting.rule, depth=of.depth, beam=of.beam, **setting.shape)


def _featured(setting: Setting) -> Chosen:
    return Chosen(serving.featured(setting.pool, features.best(setting.pool), setting.slots))


def _guesses(setting: Setting) -> Engine:
    own = features.best(setting.pool)
    return pooled.guessing(setting.pool, own, setting.length, setting.rule, **setting.shape)


def _cached(setting: Setting) -> Engine:
    of, k = setting.config, setting.length
    return pooled.querying(setting.pool, k, setting.rule, layers=of.layers, width=of.layer_nodes, **setting.shape)


def _several(setting: Setting) -> Engine:
    of, k = setting.config, setting.length
    return pooled.several(setting.pool, k, drafts(of, k), of.several, setting.rule, **setting.shape)


def drafts(config: Bench, k: int) -> int:
    """How many drafts every place has; UserError where slots have no room for them."""
    if config.drafts < 1 or k * config.drafts > MAX_DRAFT:
        raise UserError(
            f"--drafts {config.drafts} at each of {k} places makes {k * config.drafts} nodes, which must lie between "
            f"{k} and {MAX_DRAFT}; give another number, or --num-speculative-tokens"
        )
    return config.drafts


def check_table(config: Bench) -> None:
    """Raises UserError where trigram tables cannot fill a tree of these settings."""
    check_tree(config)
    if config.beam > WIDEST:
        raise UserError(
            f"--beam {config.beam} will not do; `adaptive` knows at most {WIDEST} successors of two tokens, give no more"
        )


def check_tree(config: Bench) -> None:
    """Raises UserError where a beam cannot fill a tree of these settings."""
    if not (1 <= config.depth <= config.nodes <= MAX_NODES and config.beam >= 1):
        said = f"--nodes {config.nodes} --depth {config.depth} --beam {config.beam}"
        raise UserError(
            f"{said} will not do; give 1 to {MAX_NODES} nodes, a depth from 1 to as many, and a beam from 1"
        )
    if config.nodes > met(config.depth, config.beam):
        said = f"a --beam of {config.beam} and --depth {config.depth} meet {met(config.depth, config.beam)} tokens"
        raise UserError(f"{said}, too few for --nodes {config.nodes}; raise beam or depth, or ask for fewer nodes")


def check_graph(config: Bench) -> None:
    """As `check_tree`, of graphs."""
    check_tree(config)
    if config.ancestors < 0:
        raise UserError(
            f"--ancestors {config.ancestors} will not do; give a whole number from 0, which merges by the token"
        )


def check_cache(config: Bench) -> None:
    """Raises UserError for a cache of candidates that would hold nothing, or more than one is worth."""
    for name in ("layers", "layer_nodes"):
        if not 1 <= (value := getattr(config, name)) <= MAX_NODES:
            said = f"--{name.replace('_', '-')} {value}"
            raise UserError(f"{said} will not do; give a number from 1 to {MAX_NODES}")


def _on_trees(choose: Callable, engine: Callable, cost: Callable, own: Callable = check_tree) -> Recipe:
    return Recipe(choose, engine, cost, nodes=lambda config: config.nodes, check=own)


RECIPES = {
    "autoregressive": Recipe(partial(_always, "autoregressive"), _chains, costs.nothing),
    "base": Recipe(partial(_always, "base"), _chains, costs.nothing),
    "mixed": Recipe(partial(_always, "mixed"), _chains, costs.mixed),
    "routed": Recipe(_routed, _chains, costs.specialists),
    "chosen": Recipe(_fastest, _families, costs.both),
    "random": Recipe(partial(_beforehand, "random"), _chains, costs.specialists),
    "wrong": Recipe(partial(_beforehand, "wrong"), _chains, costs.specialists),
    "oracle": Recipe(partial(_beforehand, "oracle"), _chains, costs.specialists),
    "online": Recipe(partial(_online, None), _hedges, costs.both),
    "online-wrong": Recipe(partial(_online, "wrong"), _hedges, costs.both),
    "ngram": Recipe(partial(_always, "ngram"), _lookups, costs.nothing),
    "adaptive": _on_trees(partial(_always, "adaptive"), _tables, partial(costs.added, "adaptive"), check_table),
    "multi-draft": Recipe(_routed, _several, costs.specialists),
    "feature": Recipe(_featured, _guesses, costs.of_features),
    "tree": _on_trees(_routed, _trees, costs.specialists),
    "graph": _on_trees(_routed, _graphs, costs.specialists, check_graph),
    "merged-trees": _on_trees(_beside_mixed, _merged_trees, costs.both),
    "merged-trees-two-best": _on_trees(_two_best, _merged_trees, costs.specialists),
    "card": Recipe(_routed, _cached, costs.specialists, check=check_cache),
}
ALL = tuple(name for name in METHODS if name not in ONLINE)
"""What `all` stands for, of a pool that has it."""
