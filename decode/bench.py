"""Measures ways of drafting against autoregressive decoding: same prompts, one process, interleaved prompt by prompt.

    python -m decode.bench --pool runs/testbed/pool --prompts ../shared/data/eval --limit 24 --json bench.json

Seconds run from token ids in host memory to the last token there, prefill and routing included. Warm-up is excluded; of
the passes the median counts. At temperature 0 every method's tokens are compared with autoregressive decoding through
the very program that the method used, and with the autoregressive program that was timed.
"""

import dataclasses
import itertools
import statistics
import subprocess
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import jax
import numpy as np
from tqdm import tqdm

from decode import rivals, widened
from decode.figures import Ask, Pass, Result, choices, cluster_figures, figures, rounds_by_drafter, router_figures
from decode.rivals import Contender
from jaxspec import serving, sharding
from jaxspec.config import Mesh, UserError, command_line
from jaxspec.drafters.tree import met
from jaxspec.engine import Engine, Method, Seconds
from jaxspec.requests import MAX_DRAFT, MAX_NODES, Completion, Request, bucket_of, room_of
from jaxspec.router import TRUNK
from jaxspec.store.families import options
from jaxspec.store.models import encode
from jaxspec.store.pool import ONLINE, TEST, Pool, draft_length, load_pool, with_target
from jaxspec.store.prompts import Line, read_prompts
from jaxspec.store.stages import write_json

REFILLS = 4  # prompts that a slot serves in one measured batch


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What is measured, and how."""

    pool: str
    """Folder of the pool."""
    prompts: str = ""
    """Prompts to decode; without it the pool's own test split."""
    include: tuple[str, ...] = ()
    """Files of the prompts folder, named without suffix; none means those that the pool was trained on."""
    tasks: tuple[str, ...] = ()
    """Tasks whose prompts are taken, by their labels; none means all."""
    limit: int | None = None
    """First prompts taken of each task."""
    json: str = ""
    """File for the results."""
    methods: tuple[str, ...] = ("autoregressive", "base", "mixed", "routed", "chosen", "random", "oracle")
    """Any of autoregressive, base, mixed, routed, chosen, random, wrong, oracle, ngram, tree, multi-draft, online and
    online-wrong: `routed` drafts with the drafter of the prompt's task, `chosen` with the drafter and, one prompt at a time,
    the draft length that promise the most, `ngram` with what followed in the text before, `tree` as routed, token trees of
    `nodes` and `depth` in place of chains, `multi-draft` as routed with several drafts of every place; `online` begins as
    routed and `online-wrong` with a wrong drafter,
    and both change it within the text for the one that the target agrees with; merged-average, merged-awd, merged-doge, once
    `train.extras` has made them; and what `train.adopt` has added; NAME/METHOD is a rival's method."""
    rivals: tuple[str, ...] = ()
    """Further pools of the same target, each NAME=POOL, or NAME=POOL,DRAFT where its base drafter has another place than its
    manifest says: a row NAME measures a rival's routed drafters at its own draft length, in the type and on the mesh of
    the bench's pool, whose `base` is that of every row's speedup."""
    batch: int = 1
    """Slots: prompts decoded together; a finished one's slot is filled again."""
    admit_rows: int = 1
    """Prompts read together when slots fall free."""
    smallest_bucket: int = 32
    """Prompts are padded to at least so many tokens; a large value means fewer programs to compile."""
    passes: int = 3
    """Timed passes over all prompts."""
    max_new_tokens: int = 96
    """Longest completion, in tokens."""
    num_speculative_tokens: int | None = None
    """Tokens drafted a round; None is what calibration chose, for each pool its own."""
    nodes: int = 16
    """Tokens of a tree that are verified a round, for `tree`."""
    depth: int = 6
    """Levels of a tree, of which each costs a call of the drafter."""
    beam: int = 4
    """Nodes of a level of a tree that are expanded, and children that each of them is given."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""
    acceptance: Literal["rejection", "gumbel"] = "rejection"
    """Rule above temperature 0: p/q rejection, or Gumbel coupling, whose text does not depend on the drafter."""
    top_k: int | None = None
    """Sample among so many tokens."""
    top_p: float | None = None
    """Sample among the likeliest tokens of this mass."""
    drafts: int = 2
    """Drafts of every place by `multi-draft`; a round verifies so many times `num-speculative-tokens`."""
    several: Literal["greedy-drafts", "recursive", "recursive-with-replacement", "k-seq"] = "recursive"
    """How they are drawn and chosen among above temperature 0: the likeliest and one draw by the rule that is optimal for them,
    draws without or with replacement by recursive rejection, or draws with replacement by K-SEQ. The first draft, which goes
    on, is kept most often by recursive rejection."""
    seed: int = 0
    """Seed of sampling and of random routes."""
    widths: tuple[int, ...] = (1, 2, 4, 8)
    """Widths at which the autoregressive baseline is tried; the fastest is timed."""
    dtype: Literal["", "float32", "bfloat16"] = ""
    """float32 or bfloat16; empty is what the pool was made with."""
    target: str = ""
    """Another place of the pool's target."""
    widen: str = ""
    """llama-2-7b, llama-3.2-1b or llama-3.1-8b: the target is widened to that shape and cost and says what it said before;
    rounds are timed anew first, unless `num-speculative-tokens` is given."""
    lengths: tuple[int, ...] = ()
    """With `widen`, the numbers of drafted tokens whose rounds are timed; none means those of calibration."""
    draft: str = ""
    """Another place of the pool's base drafter."""
    mesh: Mesh = field(default_factory=Mesh)
    """The devices that decode; the slots divide over `data`."""


def run(config: Bench) -> None:
    """Prints the table and writes the JSON."""
    bench, _ = measure(prepare(config))
    _print(bench)
    if config.json:
        write_json(Path(config.json), bench)


class Prepared(NamedTuple):
    """All that is ready to be timed: pools, what is decoded by which methods, and their programs.

    width: of the autoregressive baseline.
    """

    contenders: list[Contender]
    work: "Work"
    engines: "Mapping[str, Decoder]"
    width: int


def prepare(config: Bench) -> Prepared:
    """Loads pools and prompts and makes the methods' programs; UserError for what cannot be measured."""
    _check(config)
    mesh = sharding.asked(config.mesh)
    sharding.check_rows(config.batch, mesh, "--batch")
    pool = load_pool(config.pool, target=config.target, draft=config.draft, dtype=config.dtype, mesh=mesh)
    contenders = _contenders(config, pool)
    rule = _rule(config)
    shape = _shape(config, contenders[0].asks)
    if config.widen:
        contenders = _widened(config, contenders, rule, shape)
    pool, asks = contenders[0].pool, contenders[0].asks
    batches = list(_batches(asks, config))
    of_all = lambda make: {own.row(name): one for own in contenders for name, one in make(own).items()}
    work = Work(config, asks, batches, of_all(lambda own: _methods(config, own)))
    width, autoregressive = _fastest(work, pool, shape, rule)
    engines = of_all(lambda own: _engines(config, own, rule, shape)) | {"autoregressive": autoregressive}
    return Prepared(contenders, work, engines, width)


def measure(prepared: Prepared) -> tuple[dict, list[Pass]]:
    """The bench's JSON, and the passes that it comes from."""
    contenders, work, engines, width = prepared
    config, asks, pool = work.config, work.asks, contenders[0].pool
    rule = _rule(config)
    work.warm_up(engines)
    passes = work.passes(engines)
    parity = {} if rule == "rejection" else work.parity(engines)
    one_wide = lambda: serving.autoregressive(pool, 1, rule, **_shape(config, asks))
    narrow = work.texts(one_wide()) if parity and width != 1 else None
    bench = {
        **_conditions(config, pool, width),
        **figures(pool, asks, passes, parity, narrow),
        **_of_routing(contenders[0], passes, engines),
        "clusters": cluster_figures(pool),
        "curves": pool.facts["curves"],
        "rivals": {
            own.name: {**_of_pool(config, own.pool), **_of_routing(own, passes, engines)} for own in contenders[1:]
        },
    }
    return bench, passes


class Decoder(Protocol):
    """What takes part in a bench: an `Engine`, or other software behind its face."""

    lengths: list[int]
    seconds: Seconds

    def complete(self, requests: Sequence[Request], method: Method) -> list[Completion]:
        """Completions in the order of the requests; `seconds` tells what they took."""
        ...


class Chosen(NamedTuple):
    """A way of choosing drafters.

    routes: each prompt's, for `random`, `oracle` and what begins `wrong`; reach: the routes that some prompt may take.
    """

    method: Method
    routes: np.ndarray | None = None
    reach: Sequence[int] = ()


class Work(NamedTuple):
    """The batches to decode, and the ways of choosing drafters for them."""

    config: Bench
    asks: Sequence[Ask]
    batches: Sequence[tuple[str, list[int]]]
    methods: dict[str, Chosen]

    @property
    def sample(self) -> list[list[int]]:
        """Rows of a few batches, on which settings are tried."""
        return [rows for _, rows in self.batches[:: max(1, len(self.batches) // 3)]][:3]

    def decode(self, engine: Decoder, name: str, rows: list[int], **changes) -> Result:
        """One batch by one method."""
        method, routes, _ = self.methods[name]
        of = lambda i: {} if routes is None else {"route": int(routes[i])}
        requests = [dataclasses.replace(self.asks[i].request, **(of(i) | changes)) for i in rows]
        return Result(rows, engine.complete(requests, method), engine.seconds)

    def warm_up(self, engines: Mapping[str, Decoder]) -> None:
        """Compiles every (program, bucket) and fills the caches of merged weights."""
        seen = set()
        for _, rows in tqdm(self.batches, desc="warm-up", leave=False):
            for i, name in itertools.product(rows, self.methods):
                bucket = bucket_of(len(self.asks[i].request.ids), self.config.smallest_bucket)
                kind, method = (name, bucket), self.methods[name].method
                families = {method.family(route): {"route": route} for route in self.methods[name].reach} or {0: {}}
                for own, k in itertools.product(families.values(), engines[name].lengths) if kind not in seen else ():
                    self.decode(engines[name], name, [i], max_new_tokens=2, num_speculative_tokens=k, **own)
                seen.add(kind)
        for chosen in self.methods.values() if self.config.batch == 1 else ():
            for route in chosen.reach:
                chosen.method.drafter_params(np.array([route]))

    def passes(self, engines: Mapping[str, Decoder]) -> list[Pass]:
        """All methods on all batches, so many times; methods take turns on each batch."""
        done: list[Pass] = []
        with tqdm(total=self.config.passes * len(self.batches) * len(engines), desc="bench", unit="batch") as bar:
            for number in range(self.config.passes):
                results: dict[str, list[Result]] = defaultdict(list)
                for at, (_, rows) in enumerate(self.batches):
                    names = list(self.methods)
                    turn = (number + at) % len(names)
                    for name in names[turn:] + names[:turn]:
                        results[name].append(self.decode(engines[name], name, rows))
                        bar.update()
                done.append(results)
        return done

    def parity(self, engines: Mapping[str, Decoder]) -> dict[str, dict[int, list[int]]]:
        """Each method's program with nothing drafted: autoregressive decoding, bit for bit comparable."""
        slots = self.config.batch
        same: dict[tuple, dict[int, list[int]]] = {}
        outputs: dict[str, dict[int, list[int]]] = {}
        for name, chosen in tqdm(self.methods.items(), desc="parity", leave=False):
            kind = (id(engines[name]), jax.tree.structure(chosen.method.drafter_params(np.full(slots, TRUNK))))
            if kind not in same:
                same[kind] = self.texts(engines[name], name)
            outputs[name] = same[kind]
        return outputs

    def texts(self, engine: Decoder, name: str = "autoregressive") -> dict[int, list[int]]:
        """Every prompt's tokens through an engine's program with nothing drafted."""
        done = [(rows, self.decode(engine, name, rows, draft_limit=0).completions) for _, rows in self.batches]
        return {i: own.ids for rows, completions in done for i, own in zip(rows, completions, strict=True)}


def _check(config: Bench) -> None:
    rivals.measured(config.methods, rivals.parse(config.rivals, config.pool), config.pool)
    if config.rivals and not config.prompts:
        raise UserError("--rivals needs --prompts: a rival may have been trained on the pool's own test split")
    if config.lengths and (not config.widen or config.num_speculative_tokens is not None):
        raise UserError("--lengths goes with --widen, and without --num-speculative-tokens; remove it")
    widened.check_lengths(config.lengths)
    if _has_trees(config):
        _check_tree(config)
    if config.json and not Path(config.json).absolute().parent.is_dir():
        raise UserError(f"--json {config.json}: its folder does not exist; make it first")


def _has_trees(config: Bench) -> bool:
    return any(method.rpartition("/")[2] == "tree" for method in config.methods)


def _check_tree(config: Bench) -> None:
    if not (1 <= config.depth <= config.nodes <= MAX_NODES and config.beam >= 1):
        said = f"--nodes {config.nodes} --depth {config.depth} --beam {config.beam}"
        raise UserError(
            f"{said} will not do; give 1 to {MAX_NODES} nodes, a depth from 1 to as many, and a beam from 1"
        )
    if config.nodes > met(config.depth, config.beam):
        said = f"a --beam of {config.beam} and --depth {config.depth} meet {met(config.depth, config.beam)} tokens"
        raise UserError(f"{said}, too few for --nodes {config.nodes}; raise beam or depth, or ask for fewer nodes")


def _rule(config: Bench) -> str:
    return config.acceptance if config.temperature > 0 else "greedy"


def _contenders(config: Bench, pool: Pool) -> list[Contender]:
    """The bench's own pool, then its rivals."""
    named = rivals.parse(config.rivals, config.pool)
    others = rivals.load(named, pool)
    asks = _asks(config, pool, min(own.pair.longest for own in (pool, *others.values())))
    seen_by = lambda own: [_seen_by(own, ask) for ask in asks]
    methods = rivals.measured(config.methods, named, config.pool)
    rows = [Contender(name, own, methods[name], seen_by(own)) for name, own in others.items()]
    return [Contender("", pool, methods[""], asks), *rows]


def _widened(config: Bench, contenders: Sequence[Contender], rule: str, shape: dict) -> list[Contender]:
    """The pools with their target widened; where no draft length is asked for, calibrated by its rounds."""
    own, requests = contenders[0].pool, [ask.request for ask in contenders[0].asks]
    longest = max(
        (*config.lengths, draft_length(own.facts, config.num_speculative_tokens, least=1, slots=config.batch))
    )
    load = widened.load_of(own, requests, config.batch, config.admit_rows, longest)
    target = widened.widened(own, config.widen, load, config.mesh.memory).pair.target
    pools = [with_target(each.pool, target) for each in contenders]
    if config.num_speculative_tokens is None:
        pools = [widened.retimed(pool, requests, config.lengths, rule, **shape) for pool in pools]
    return [each._replace(pool=pool) for each, pool in zip(contenders, pools, strict=True)]


def _seen_by(rival: Pool, ask: Ask) -> Ask:
    """The prompt with its cluster in a rival, whose clusters are not those that the lines of a test split name."""
    settings = {key: value for key, value in ask.line.settings.items() if key != "cluster"}
    line = dataclasses.replace(ask.line, settings=settings)
    return ask._replace(line=line, cluster=_cluster(rival, line))


def _asks(config: Bench, pool: Pool, longest: int) -> list[Ask]:
    source = config.prompts or str(pool.path / TEST)
    include = config.include or (tuple(pool.facts["include"]) if config.prompts and Path(source).is_dir() else ())
    room = longest - config.max_new_tokens
    taken: dict[str, int] = defaultdict(int)
    asks, too_long = [], 0
    for number, line in enumerate(read_prompts(source, include=include)):
        task = line.task or "all"
        if (config.tasks and task not in config.tasks) or (config.limit is not None and taken[task] >= config.limit):
            continue
        ids = encode(pool.pair.tokenizer, line)
        if len(ids) > room:
            too_long += 1
            continue
        taken[task] += 1
        request = Request(
            ids=ids,
            max_new_tokens=config.max_new_tokens,
            number=number,
            seed=config.seed,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
        )
        asks.append(Ask(line, request, task, _cluster(pool, line)))
    if too_long:
        print(f"bench: {too_long} prompts longer than {room} tokens were left out")
    if not asks:
        of = f" of {', '.join(config.tasks)}" if config.tasks else ""
        raise UserError(f"{source}: no prompt{of} of at most {room} tokens")
    return asks


def _cluster(pool: Pool, line: Line) -> int:
    """The cluster whose majority label is the line's, the largest of them; the line's own cluster without labels."""
    own = [t for t, label in enumerate(pool.facts["labels"]) if label is not None and label == line.task]
    return max(own, key=lambda t: pool.facts["sizes"][t]) if own else line.settings.get("cluster", TRUNK)


def _batches(asks: Sequence[Ask], config: Bench):
    """Prompts of one task, so many that every slot serves a few; one at a time where there is one slot."""
    by_task: dict[str, list[int]] = defaultdict(list)
    for i, ask in enumerate(asks):
        by_task[ask.task].append(i)
    size = config.batch if config.batch == 1 else REFILLS * config.batch
    for task, rows in by_task.items():
        for at in range(0, len(rows), size):
            yield task, rows[at : at + size]


def _shape(config: Bench, asks: Sequence[Ask]) -> dict:
    longest = max(bucket_of(len(ask.request.ids), config.smallest_bucket) for ask in asks)
    room = room_of(longest, config.max_new_tokens, config.nodes if _has_trees(config) else 0)
    return {"slots": config.batch, "room": room, "admit_rows": config.admit_rows, "smallest": config.smallest_bucket}


def _methods(config: Bench, contender: Contender) -> dict[str, Chosen]:
    """A pool's ways of choosing drafters, by their own names."""
    pool, asks = contender.pool, contender.asks
    among = options(pool.facts, config.num_speculative_tokens, config.batch)
    tasks = len(pool.tasks)
    rng = np.random.default_rng(config.seed)
    random = rng.integers(tasks, size=len(asks))
    own = np.array([ask.cluster for ask in asks])
    oracle = np.array([*pool.drafters, TRUNK])[own]
    wrong = np.where(tasks > 1, (own + rng.integers(1, max(tasks, 2), size=len(asks))) % tasks, TRUNK)
    beforehand = {"random": random, "wrong": wrong, "oracle": oracle}
    given = serving.given(pool, config.batch)
    by_router = {
        "routed": lambda: serving.routed(pool, config.batch),
        "multi-draft": lambda: serving.routed(pool, config.batch),
        "tree": lambda: serving.routed(pool, config.batch),
        "chosen": lambda: serving.chosen(pool, config.batch, among),
    }
    made = {}
    for name in contender.methods:
        if name in by_router:
            reach = range(TRUNK, len(among.names if name == "chosen" else pool.names))
            made[name] = Chosen(by_router[name](), reach=[r for r in reach if r < 0 or among.family[r] >= 0])
        elif name in ONLINE:
            made[name] = Chosen(serving.hedging(pool, config.batch), wrong if name.endswith("wrong") else None)
        elif name in beforehand:
            made[name] = Chosen(given, beforehand[name], np.unique(beforehand[name]).tolist())
        else:
            made[name] = Chosen(serving.always(pool, name, config.batch))
    return made


def _engines(config: Bench, contender: Contender, rule: str, shape: dict) -> dict[str, Engine]:
    """A pool's methods' programs, at its own draft length, by the methods' own names."""
    pool = contender.pool
    k = draft_length(pool.facts, config.num_speculative_tokens, least=1, slots=config.batch)
    among = options(pool.facts, config.num_speculative_tokens, config.batch)
    online = cache(lambda: serving.online(pool, k, rule, **shape))
    special = {
        "chosen": lambda: serving.choosing(pool, among.families, rule, **shape),
        "ngram": lambda: serving.looking_up(pool, k, rule, **shape),
        "multi-draft": lambda: serving.several(pool, k, _drafts(config, k), config.several, rule, **shape),
        "tree": lambda: serving.branching(pool, config.nodes, rule, depth=config.depth, beam=config.beam, **shape),
        **dict.fromkeys(ONLINE, online),
    }
    spec = serving.speculative(pool, k, rule, **shape)
    return {name: special[name]() if name in special else spec for name in contender.methods}


def _drafts(config: Bench, k: int) -> int:
    """How many drafts every place has; UserError where slots have no room for them."""
    if config.drafts < 1 or k * config.drafts > MAX_DRAFT:
        raise UserError(
            f"--drafts {config.drafts} at each of {k} places makes {k * config.drafts} nodes, which must lie between "
            f"{k} and {MAX_DRAFT}; give another number, or --num-speculative-tokens"
        )
    return config.drafts


def _fastest(work: Work, pool: Pool, shape: dict, rule: str) -> tuple[int, Engine]:
    """The width at which autoregressive decoding of a few prompts is fastest."""
    if len(work.config.widths) == 1:
        (width,) = work.config.widths
        return width, serving.autoregressive(pool, width, rule, **shape)
    engines = {w: serving.autoregressive(pool, w, rule, **shape) for w in work.config.widths}
    seconds = lambda engine: sum(work.decode(engine, "autoregressive", rows).seconds.decode for rows in work.sample)
    best = quickest({width: partial(seconds, engine) for width, engine in engines.items()})
    return best, engines[best]


def quickest(seconds: Mapping[int, Callable[[], float]]) -> int:
    """The number that takes the least, by the median of three tries in turn after one that does not count."""
    tries = [{number: once() for number, once in seconds.items()} for _ in range(4)][1:]
    return min(seconds, key=lambda number: statistics.median(own[number] for own in tries))


def _conditions(config: Bench, pool: Pool, width: int) -> dict:
    return {
        "schema": 1,
        "device": jax.devices()[0].device_kind,
        "dtype": config.dtype or pool.facts["dtype"],
        "batch": config.batch,
        "temperature": config.temperature,
        "acceptance": _rule(config),
        "commit": _commit(),
        "target": widened.name_of(pool, config.widen),
        **_of_pool(config, pool),
        "tree": {name: getattr(config, name) for name in ("nodes", "depth", "beam")} if _has_trees(config) else None,
        "autoregressive_width": width,
        "max_new_tokens": config.max_new_tokens,
        "passes": config.passes,
        "versions": {"jax": jax.__version__},
    }


def _of_pool(config: Bench, pool: Pool) -> dict:
    """What a pool's figures depend on; `training` is None for a pool of an earlier version."""
    return {
        "pool": str(pool.path),
        "num_speculative_tokens": draft_length(pool.facts, config.num_speculative_tokens, least=1, slots=config.batch),
        "drafter_parameters": sum(leaf.size for leaf in jax.tree.leaves(pool.pair.draft.params)),
        "num_tasks": len(pool.tasks),
        "training": pool.facts["training"],
        "round_milliseconds": _rounds(config, pool),
    }


def _rounds(config: Bench, pool: Pool) -> dict[str, dict[int, float]] | None:
    """What rounds of a widened target took, by family, whose own has no name, and draft length; None if not timed."""
    if not config.widen or config.num_speculative_tokens is not None:
        return None
    families = {"": pool.facts, **pool.facts["further"]}
    return {
        name: {k: row["round_milliseconds"] for k, row in own["calibration"].items()} for name, own in families.items()
    }


def _of_routing(contender: Contender, passes: Sequence[dict], engines: Mapping[str, Decoder]) -> dict:
    """Figures of a pool's router and choices; its methods that share a program have the same cost of drafting."""
    own, results = contender.own(engines), [contender.own(one) for one in passes]
    equals = [name for name, engine in own.items() if engine is own.get("routed")]
    return {
        "router": router_figures(contender.pool, contender.asks, results, equals),
        "choices": choices(contender.pool, contender.asks, results),
        "rounds_by_drafter": {
            name: rounds_by_drafter(contender.pool, contender.asks, results[0][name]) for name in own if name in ONLINE
        },
    }


def _commit() -> str | None:
    try:
        place = Path(__file__).parent
        out = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=place, capture_output=True, text=True, check=True
        )
        return out.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _print(bench: dict) -> None:
    said = f"{bench['device']}, {bench['dtype']}, batch {bench['batch']}, K = {bench['num_speculative_tokens']}"
    print(f"target {bench['target']}, {said}, temperature {bench['temperature']}", end=", ")
    print(f"autoregressive {bench['autoregressive_width']} wide")
    names = list(bench["mean"])
    print("| task | " + " | ".join(f"{name} acc / x AR" for name in names[1:]) + " |")
    print("|---|" + "---|" * len(names[1:]))
    for task, row in [*bench["tasks"].items(), ("**mean**", bench["mean"])]:
        cells = [
            f"{_said(row[name]['draft_accuracy'], '.3f')} / {_said(row[name]['speedup_vs_autoregressive'], '.2f')}"
            for name in names[1:]
        ]
        print(f"| {task} | " + " | ".join(cells) + " |")
    if bench["tree"]:
        of = lambda row: [row[f] for f in ("mean_acceptance_length", "nodes_a_round", "drafter_calls_a_round")]
        costs = (f"{name} {{:.2f}} ({{:g}}, {{:g}})".format(*of(bench["mean"][name])) for name in names[1:])
        print(f"tokens a target call (nodes verified, drafter calls): {', '.join(costs)}")
    if bench["mean"][names[-1]]["equal_to_autoregressive"] is not None:
        least = min(bench["tasks"][task][name]["equal_to_autoregressive"] for task in bench["tasks"] for name in names)
        print(f"equal to autoregressive decoding through the same program: {least:.4f} at least")
    parted = bench["first_differences_one_wide"]
    if parted:
        widest = max((own["gap"] for own in parted if own["gap"] is not None), default=None)
        gap = f", the widest at logits {widest:.1f} steps of bfloat16 apart" if widest is not None else ""
        print(f"through a program one token wide {len(parted)} texts part{gap}")
    for name, own in [("", bench), *((f"{name}'s ", own) for name, own in bench["rivals"].items())]:
        _print_router(name, own["router"])


def _print_router(whose: str, router: dict | None) -> None:
    if router:
        print(
            f"{whose}router: accuracy {_said(router['accuracy'], '.3f')}, {router['milliseconds']:.2f} ms a prompt "
            f"({100 * router['share_of_time_to_first_token']:.1f} % of the time to the first token), "
            f"fallback {router['fallback_rate']:.3f}, regret against the oracle {_said(router['regret'], '.3f')}, "
            f"against the best of each task {_said(router['regret_to_best'], '.3f')}"
        )


def _said(value: float | None, form: str) -> str:
    return format(value, form) if value is not None else "-"


if __name__ == "__main__":
    command_line(Bench, run)
