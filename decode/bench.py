"""Measures ways of drafting against autoregressive decoding: same prompts, one process, interleaved prompt by prompt.

    python -m decode.bench --pool runs/testbed/pool --prompts ../shared/data/eval --limit 24 --json bench.json

Seconds run from token ids in host memory to the last token there, prefill and routing included. Warm-up is excluded; of
the passes the median counts. At temperature 0 every method's tokens are compared with autoregressive decoding through
the very program that the method used, and with the autoregressive program that was timed.
"""

import dataclasses
import subprocess
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax

from decode import methods, rivals, widened
from decode.figures import Ask, Pass, choices, cluster_figures, figures, rounds_by_drafter, router_figures
from decode.methods import Setting
from decode.rivals import Contender
from decode.settings import Bench
from decode.summary import summary
from decode.work import Decoder, Work, quickest
from jaxspec import pooled, sharding
from jaxspec.config import UserError, command_line
from jaxspec.engine import Engine
from jaxspec.requests import Request, bucket_of, room_of
from jaxspec.router import TRUNK
from jaxspec.store.facts import calibration, draft_length, find_pool
from jaxspec.store.loading import load_pool, with_target
from jaxspec.store.models import encode
from jaxspec.store.names import ONLINE, TEST
from jaxspec.store.pool import Pool
from jaxspec.store.prompts import Line, read_prompts
from jaxspec.store.recalibration import elsewhere
from jaxspec.store.stages import write_json

REFILLS = 4  # prompts that a slot serves in one measured batch


def run(config: Bench) -> None:
    """Prints the table and writes the JSON."""
    bench, _ = measure(prepare(config))
    _print(bench)
    if config.json:
        write_json(Path(config.json), bench)


class Prepared(NamedTuple):
    """All that is ready to be timed: pools, what is decoded by which methods, and their programs.

    width: of the autoregressive baseline; trained: what methods took to train.
    """

    contenders: list[Contender]
    work: Work
    engines: Mapping[str, Decoder]
    width: int
    trained: Mapping[str, Any]


def prepare(config: Bench) -> Prepared:
    """Loads pools and prompts and makes the methods' programs; UserError for what cannot be measured."""
    find_pool(config.pool)
    config = dataclasses.replace(config, methods=methods.expanded(config.methods, Path(config.pool)))
    _check(config)
    mesh = sharding.asked(config.mesh)
    sharding.check_rows(config.batch, mesh, "--batch")
    pool = load_pool(config.pool, target=config.target, draft=config.draft, dtype=config.dtype, mesh=mesh)
    contenders = _contenders(config, pool)
    if config.num_speculative_tokens is None and not config.widen:
        for said in filter(None, (elsewhere(own.pool.facts, str(own.pool.path)) for own in contenders)):
            print(f"bench: {said}")
    rule = _rule(config)
    shape = _shape(config, contenders[0].asks)
    if config.widen:
        contenders = _widened(config, contenders, rule, shape)
    pool, asks = contenders[0].pool, contenders[0].asks
    batches = list(_batches(asks, config))
    settings = [Setting(config, own, rule, shape) for own in contenders]
    of_all = lambda make: {own.contender.row(name): one for own in settings for name, one in make(own).items()}
    work = Work(config, asks, batches, of_all(methods.choosing))
    width, autoregressive = _fastest(work, pool, shape, rule)
    engines = of_all(methods.engines) | {"autoregressive": autoregressive}
    return Prepared(contenders, work, engines, width, of_all(methods.trained))


def measure(prepared: Prepared) -> tuple[dict, list[Pass]]:
    """The bench's JSON, and the passes that it comes from."""
    contenders, work, engines, width, trained = prepared
    config, asks, pool = work.config, work.asks, contenders[0].pool
    rule = _rule(config)
    work.warm_up(engines)
    passes = work.passes(engines)
    parity = {} if rule == "rejection" else work.parity(engines)
    one_wide = lambda: pooled.autoregressive(pool, 1, rule, **_shape(config, asks))
    narrow = work.texts(one_wide()) if parity and width != 1 else None
    bench = {
        **_conditions(config, pool, width),
        **figures(pool, asks, passes, parity, narrow),
        **_of_routing(contenders[0], passes, engines),
        "trained": trained,
        "clusters": cluster_figures(pool),
        "curves": pool.facts["curves"],
        "rivals": {
            own.name: {**_of_pool(config, own.pool), **_of_routing(own, passes, engines)} for own in contenders[1:]
        },
    }
    return bench, passes


def _check(config: Bench) -> None:
    rivals.measured(config.methods, rivals.parse(config.rivals, config.pool), config.pool)
    if config.rivals and not config.prompts:
        raise UserError("--rivals needs --prompts: a rival may have been trained on the pool's own test split")
    if config.lengths and (not config.widen or config.num_speculative_tokens is not None):
        raise UserError("--lengths goes with --widen, and without --num-speculative-tokens; remove it")
    widened.check_lengths(config.lengths)
    methods.check(config)
    if config.json and not Path(config.json).absolute().parent.is_dir():
        raise UserError(f"--json {config.json}: its folder does not exist; make it first")


def _rule(config: Bench) -> str:
    return config.acceptance if config.temperature > 0 else "greedy"


def _contenders(config: Bench, pool: Pool) -> list[Contender]:
    """The bench's own pool, then its rivals."""
    named = rivals.parse(config.rivals, config.pool)
    others = rivals.load(named, pool)
    asks = _asks(config, pool, min(own.pair.longest for own in (pool, *others.values())))
    seen_by = lambda own: [_seen_by(own, ask) for ask in asks]
    measured = rivals.measured(config.methods, named, config.pool)
    rows = [Contender(name, own, measured[name], seen_by(own)) for name, own in others.items()]
    return [Contender("", pool, measured[""], asks), *rows]


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
    room = room_of(longest, config.max_new_tokens, methods.most_nodes(config))
    return {"slots": config.batch, "room": room, "admit_rows": config.admit_rows, "smallest": config.smallest_bucket}


def _fastest(work: Work, pool: Pool, shape: dict, rule: str) -> tuple[int, Engine]:
    """The width at which autoregressive decoding of a few prompts is fastest."""
    if len(work.config.widths) == 1:
        (width,) = work.config.widths
        return width, pooled.autoregressive(pool, width, rule, **shape)
    engines = {w: pooled.autoregressive(pool, w, rule, **shape) for w in work.config.widths}
    seconds = lambda engine: sum(work.decode(engine, "autoregressive", rows).seconds.decode for rows in work.sample)
    best = quickest({width: partial(seconds, engine) for width, engine in engines.items()})
    return best, engines[best]


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
        "tree": {name: getattr(config, name) for name in ("nodes", "depth", "beam", "ancestors")}
        if methods.most_nodes(config)
        else None,
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
        name: {k: row["round_milliseconds"] for k, row in calibration(own).items()} for name, own in families.items()
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
    print("\n".join(["", *summary(bench), ""]))
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
