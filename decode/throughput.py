"""Tokens per second of a pool by the number of slots: where speculation pays, and what mixed routes cost.

    python -m decode.throughput --pool runs/testbed/pool --prompts ../shared/data/eval --limit 16 --slots 1 4 16 64

All prompts, of all tasks in turn, go through an engine of B slots; the clock runs from the first prompt's ids in host memory
to the last token there, prefill and routing included. `mixed` decodes with the one drafter of all tasks, `one route`
with one specialist's merged weights; what a round of all slots costs `routed`, whose rows have a drafter each, beside what it
costs there, is the price of mixing. A round is timed by itself, because drafters that are right more often have fewer rounds
to bear the prompts.
Programs of different numbers of slots round differently: `parted` is the share of prompts whose routed text is not that of the
first number of slots, with the widest gap between the two logits at a first difference, in steps of bfloat16.
"""

import itertools
import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
from tqdm import tqdm

from decode import widened
from decode.differences import first_difference
from jaxspec import pooled, prepared, serving, sharding
from jaxspec.config import Mesh, UserError, command_line
from jaxspec.drafters.lm import LMDrafterParams
from jaxspec.engine import Engine, Method, unrouted
from jaxspec.requests import Completion, Request, bucket_of, checked, room_of
from jaxspec.store.facts import draft_length
from jaxspec.store.loading import load_pool
from jaxspec.store.models import encode
from jaxspec.store.pool import Pool
from jaxspec.store.prompts import read_prompts
from jaxspec.store.stages import write_json
from jaxspec.timing import slope

METHODS = ("autoregressive", "base", "mixed", "one route", "routed")

BEST = ("best K", "with it, tokens/s", "with it / autoregressive")
ROUNDS = 4, 12  # rounds of the chunks whose times are compared
FULL = 8  # times that the slots are filled for it

Texts = dict[str, list[list[int]]]


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """What is measured, and how."""

    pool: str
    """Folder of the pool."""
    prompts: str
    """Prompts to decode."""
    include: tuple[str, ...] = ()
    """Files of the prompts folder, named without suffix; none means those that the pool was trained on."""
    limit: int | None = 16
    """First prompts taken of each task."""
    slots: tuple[int, ...] = (1, 4, 16, 64)
    """Numbers of slots to measure."""
    admit_rows: int = 8
    """Prompts read together when slots fall free, at most."""
    smallest_bucket: int = 64
    """Prompts are padded to at least so many tokens; a large value means fewer programs to compile."""
    passes: int = 3
    """Timed passes, of which the median counts; methods take turns within each."""
    max_new_tokens: int = 96
    """Longest completion, in tokens."""
    num_speculative_tokens: int | None = None
    """Tokens drafted a round; None is what calibration chose."""
    lengths: tuple[int, ...] = ()
    """Numbers of drafted tokens that `routed` is also measured with in every number of slots, and 0 with them: the fastest is
    what `--calibrate.slots` should find for such a job."""
    dtype: Literal["", "float32", "bfloat16"] = ""
    """float32 or bfloat16; empty is what the pool was made with."""
    target: str = ""
    """Another place of the pool's target."""
    widen: str = ""
    """llama-2-7b, llama-3.2-1b or llama-3.1-8b: the target is widened to that shape and cost and says what it said before;
    needs `num-speculative-tokens`, as calibration's is that of another cost."""
    draft: str = ""
    """Another place of the pool's base drafter."""
    mesh: Mesh = field(default_factory=Mesh)
    """The devices that decode; the slots divide over `data`."""
    json: str = ""
    """File for the results."""


def run(config: Throughput) -> None:
    """Prints a row a number of slots, and writes the JSON."""
    if config.json and not Path(config.json).absolute().parent.is_dir():
        raise UserError(f"--json {config.json}: its folder does not exist; make it first")
    if config.widen and config.num_speculative_tokens is None:
        raise UserError("--widen needs --num-speculative-tokens: calibration's number is that of the target's own cost")
    for own in config.lengths:
        checked("num_speculative_tokens", own)
    mesh = sharding.asked(config.mesh)
    for slots in config.slots:
        sharding.check_rows(slots, mesh, "--slots")
    pool = load_pool(config.pool, target=config.target, draft=config.draft, dtype=config.dtype, mesh=mesh)
    requests = _requests(config, pool)
    k = draft_length(pool.facts, config.num_speculative_tokens, least=1)
    if config.widen:
        load = widened.load_of(pool, requests, max(config.slots), config.admit_rows, max((k, *config.lengths)))
        pool = widened.widened(pool, config.widen, load, config.mesh.memory)
    conditions = {
        "target": widened.name_of(pool, config.widen),
        "device": jax.devices()[0].device_kind,
        "dtype": config.dtype or pool.facts["dtype"],
        "num_speculative_tokens": k,
        "prompts": len(requests),
        "max_new_tokens": config.max_new_tokens,
        "autoregressive_width": pooled.idle_width(),
    }
    print(json.dumps(conditions))
    columns = ["slots", *(f"{name}, tokens/s" for name in METHODS), "routed / autoregressive"]
    columns += ["a round, routed / one route", "parted", *(BEST if config.lengths else ())]
    print("| " + " | ".join(columns) + " |\n|" + "---:|" * len(columns))
    rows, texts = [], {}
    for slots in config.slots:
        figures, texts[slots] = _measure(config, pool, requests, slots, k)
        rows.append(figures | {"parted": _parted(pool, requests, texts[config.slots[0]], texts[slots])})
        _print(rows[-1])
        if config.json:
            write_json(Path(config.json), {**conditions, "rows": rows})


def _requests(config: Throughput, pool: Pool) -> list[Request]:
    """Prompts of all tasks in turn, so that rows of many routes share the slots."""
    include = config.include or (tuple(pool.facts["include"]) if Path(config.prompts).is_dir() else ())
    by_task: dict[str, list] = defaultdict(list)
    for line in read_prompts(config.prompts, include=include, limit=config.limit):
        by_task[line.task or "all"].append(line)
    longest = max(len(lines) for lines in by_task.values())
    mixed = [lines[i] for i in range(longest) for lines in by_task.values() if i < len(lines)]
    room = pool.pair.longest - config.max_new_tokens
    requests = [
        Request(ids=ids, max_new_tokens=config.max_new_tokens, number=number)
        for number, line in enumerate(mixed)
        if len(ids := encode(pool.pair.tokenizer, line)) <= room
    ]
    if not requests:
        raise UserError(f"{config.prompts}: no prompt of at most {room} tokens")
    return requests


def _measure(config: Throughput, pool: Pool, requests: Sequence[Request], slots: int, k: int) -> tuple[dict, Texts]:
    """Figures, and each method's texts."""
    buckets = sorted({bucket_of(len(r.ids), config.smallest_bucket) for r in requests})
    shape: dict[str, Any] = {
        "slots": slots,
        "room": room_of(buckets[-1], config.max_new_tokens),
        "admit_rows": min(config.admit_rows, slots),
        "smallest": config.smallest_bucket,
    }
    drafting = {number: pooled.speculative(pool, number, **shape) for number in sorted({0, k, *config.lengths})}
    engines = {name: drafting[0 if name == "autoregressive" else k] for name in METHODS}
    methods = _methods(pool, slots)
    if config.lengths:
        engines |= {_at(number): own for number, own in drafting.items() if number != k}
        methods |= {_at(number): methods["routed"] for number in drafting if number != k}
    names = tuple(engines)
    for name in names:
        engines[name].warm_up(methods[name], buckets)
    timed: dict[str, list[dict]] = defaultdict(list)
    texts: Texts = {}
    for number in tqdm(range(config.passes), desc=f"{slots} slots", leave=False):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            completions = engines[name].complete(requests, methods[name])
            timed[name].append(_figures(engines[name], completions))
            texts[name] = [completion.ids for completion in completions]
    middle = lambda name, field: statistics.median(own[field] for own in timed[name])
    figures: dict[str, dict[str, float | None]] = {
        name: {field: middle(name, field) for field in timed[name][0]} for name in names
    }
    for name, time in _rounds({name: engines[name] for name in METHODS}, methods, requests).items():
        figures[name]["microseconds_a_round"] = time
    row = {"slots": slots, **{name: figures[name] for name in METHODS}}
    if not config.lengths:
        return row, texts
    by_length = {number: figures["routed" if number == k else _at(number)]["tokens_per_second"] for number in drafting}
    return row | {"by_length": by_length, "best": max(by_length, key=lambda own: by_length[own] or 0.0)}, texts


def _at(number: int) -> str:
    """What `routed` with so many tokens drafted is called."""
    return f"routed, K = {number}"


def _parted(pool: Pool, requests: Sequence[Request], first: Texts, other: Texts) -> dict[str, dict[str, float]]:
    """By method, the share of prompts with another text and the widest gap at a first difference."""
    out = {}
    for name in METHODS:
        pairs = zip(requests, first[name], other[name], strict=True)
        found = [own for request, a, b in pairs if (own := first_difference(pool, request, a, b))]
        gaps = [own["gap"] for own in found if own["gap"] is not None]
        out[name] = {"share": len(found) / len(requests), "widest_gap": max(gaps, default=0.0)}
    return out


def _methods(pool: Pool, slots: int) -> dict[str, Method]:
    one = LMDrafterParams(prepared.laid(pool.weights(0), slots))
    return {
        "autoregressive": serving.always(pool, "autoregressive", slots),
        "base": serving.always(pool, "base", slots),
        "mixed": serving.always(pool, "mixed", slots),
        "one route": Method("one route", unrouted, lambda routes: one),
        "routed": serving.routed(pool, slots),
    }


def _figures(engine: Engine, completions: Sequence[Completion]) -> dict[str, float]:
    tokens = sum(len(c.ids) for c in completions)
    rounds = sum(int(c.counts.num_drafts) for c in completions)
    return {
        "tokens_per_second": tokens / sum(engine.seconds),
        "mean_acceptance_length": tokens / rounds,
        "share_of_prefill": (engine.seconds.prefill + engine.seconds.route) / sum(engine.seconds),
    }


def _rounds(
    engines: dict[str, Engine], methods: dict[str, Method], requests: Sequence[Request]
) -> dict[str, float | None]:
    """Microseconds of a round, methods in turn: what a longer chunk takes over a shorter one, to each round that it is longer.

    What a chunk costs beside its rounds, such as reading what rows emitted, is in neither.
    """
    chunks: dict[str, dict[int, list[float]]] = {name: {rounds: [] for rounds in ROUNDS} for name in METHODS}
    slots = next(iter(engines.values())).slots
    fills = [requests[at : at + slots] for at in range(0, len(requests) - slots + 1, slots)][:FULL] or [requests]
    for fill, rounds, name in itertools.product(fills, ROUNDS, METHODS):
        chunks[name][rounds] += _chunks(engines[name], methods[name], fill, rounds)
    return {name: 1e6 * slope(own) if all(own.values()) else None for name, own in chunks.items()}


def _chunks(engine: Engine, method: Method, requests: Sequence[Request], rounds: int) -> list[float]:
    """Seconds of the chunks that begin with all slots taken and do not end the last row."""
    marks: list[float] = []
    for _ in engine.stream(requests, method, rounds=rounds):
        if not marks or engine.seconds.decode > marks[-1]:
            marks.append(engine.seconds.decode)
    return [end - begin for begin, end in itertools.pairwise(marks[:-1])]


def _print(row: dict[str, Any]) -> None:
    rate = lambda name: row[name]["tokens_per_second"]
    mixed, one = (row[name]["microseconds_a_round"] for name in ("routed", "one route"))
    cells = [f"{rate(name):.0f}" for name in METHODS]
    parted = row["parted"]["routed"]
    cells += [f"{rate('routed') / rate('autoregressive'):.2f}", f"{mixed / one:.2f}" if mixed and one else "-"]
    cells += [f"{parted['share']:.3f}" + (f", {parted['widest_gap']:.1f} steps" if parted["share"] else "")]
    if "best" in row:
        best = row["by_length"][row["best"]]
        cells += [f"{row['best']}", f"{best:.0f}", f"{best / rate('autoregressive'):.2f}"]
    print(f"| {row['slots']} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    command_line(Throughput, run)
