"""Measures ways of drafting against autoregressive decoding: same prompts, one process, interleaved prompt by prompt.

    python -m decode.bench --pool runs/testbed/pool --prompts ../shared/data/eval --limit 24 --json bench.json

Seconds run from token ids in host memory to the last token there, prefill and routing included. Warm-up is excluded; of
the passes the median counts. At temperature 0 every method's tokens are compared with autoregressive decoding through
the very program that the method used, and with the autoregressive program that was timed.
"""

import dataclasses
import statistics
import subprocess
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from jaxspec import metrics, serving
from jaxspec.config import UserError, command_line
from jaxspec.generate import MAX_DRAFT, Completion, Decoder, Request, Timed, bucket_of, group
from jaxspec.router import BASE
from jaxspec.serving import Method
from jaxspec.store.models import encode
from jaxspec.store.pool import POINTS, TEST, Pool, read_pool
from jaxspec.store.prompts import Line, read_prompts
from jaxspec.store.stages import read_arrays, write_json
from jaxspec.transformer import forward, unembed

METHODS = ("autoregressive", "base", "mixed", "routed", "random", "wrong", "oracle")


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What is measured, and how."""

    pool: str
    """Folder of the pool."""
    prompts: str = ""
    """Prompts to decode; without it the pool's own test split."""
    include: tuple[str, ...] = ()
    """Files of the prompts folder, named without suffix; none means those that the pool was trained on."""
    limit: int | None = None
    """First prompts taken of each task."""
    json: str = ""
    """File for the results."""
    methods: tuple[str, ...] = ("autoregressive", "base", "mixed", "routed", "random", "oracle")
    """Any of autoregressive, base, mixed, routed, random, wrong, oracle."""
    batch: int = 1
    """Prompts decoded together."""
    smallest_bucket: int = 64
    """Prompts are padded to at least so many tokens; a large value means fewer programs to compile."""
    passes: int = 3
    """Timed passes over all prompts."""
    max_new_tokens: int = 96
    """Longest completion, in tokens."""
    num_speculative_tokens: int | None = None
    """Tokens drafted a round; None is what calibration chose."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""
    top_k: int | None = None
    """Sample among so many tokens."""
    top_p: float | None = None
    """Sample among the likeliest tokens of this mass."""
    seed: int = 0
    """Seed of sampling and of random routes."""
    widths: tuple[int, ...] = (1, 2, 4, 8)
    """Widths at which the autoregressive baseline is tried; the fastest is timed."""
    dtype: str = ""
    """float32 or bfloat16; empty is what the pool was made with."""
    target: str = ""
    """Another place of the pool's target."""
    draft: str = ""
    """Another place of the pool's base drafter."""


class Ask(NamedTuple):
    """A prompt of the bench: its line, request, task and the route that knowing its label gives."""

    line: Line
    request: Request
    task: str
    oracle: int


class Result(NamedTuple):
    """One method on one batch: completions and seconds of one pass."""

    rows: list[int]
    timed: Timed


def run(config: Bench) -> None:
    """Prints the table and writes the JSON."""
    _check(config)
    pool = read_pool(config.pool, target=config.target, draft=config.draft, dtype=config.dtype)
    asks = _asks(config, pool)
    batches = list(_batches(asks, config))
    k = config.num_speculative_tokens or pool.facts["num_speculative_tokens"]
    sampled = config.temperature > 0
    spec = serving.speculative(pool, k, sampled=sampled)
    heard: list[tuple[np.ndarray, np.ndarray]] = []
    current: list[int] = []
    methods = _methods(config, pool, asks, current, heard)
    work = Work(config, pool, asks, batches, current)
    width, autoregressive = _fastest(work, methods["autoregressive"], sampled)
    programs = {name: autoregressive if name == "autoregressive" else spec for name in methods}
    work.warm_up(programs, methods)
    heard.clear()
    passes = work.passes(programs, methods)
    parity = {} if sampled else work.parity(programs, methods)
    bench = _figures(config, pool, asks, passes, parity, width, k) | {
        "router": _router(pool, asks, batches, heard, passes, config.passes),
        "clusters": _clusters(pool),
    }
    _print(bench)
    if config.json:
        write_json(Path(config.json), bench)


class Work(NamedTuple):
    """The batches to decode; `current` tells routes chosen beforehand which prompts are in hand."""

    config: Bench
    pool: Pool
    asks: Sequence[Ask]
    batches: Sequence[tuple[str, list[int]]]
    current: list[int]

    def decode(self, program: Decoder, method: Method, rows: list[int], **changes) -> Timed:
        """One batch by one method."""
        self.current[:] = rows
        requests = [dataclasses.replace(self.asks[i].request, **changes) for i in rows]
        return serving.answer(
            self.pool,
            program,
            method,
            requests,
            batch=self.config.batch,
            budget=self.config.max_new_tokens,
            smallest=self.config.smallest_bucket,
        )

    def warm_up(self, programs: dict[str, Decoder], methods: dict[str, Method]) -> None:
        """Compiles every (program, bucket) and fills the caches of merged weights."""
        seen = set()
        for _, rows in tqdm(self.batches, desc="warm-up", leave=False):
            for name, method in methods.items():
                bucket = bucket_of(max(len(self.asks[i].request.ids) for i in rows), self.config.smallest_bucket)
                kind = (name, bucket, self.asks[rows[0]].oracle)
                if kind not in seen:
                    seen.add(kind)
                    self.decode(programs[name], method, rows, max_new_tokens=2)

    def passes(self, programs: dict[str, Decoder], methods: dict[str, Method]) -> list[dict[str, list[Result]]]:
        """All methods on all batches, so many times; methods take turns on each batch."""
        done: list[dict[str, list[Result]]] = []
        with tqdm(total=self.config.passes * len(self.batches) * len(methods), desc="bench", unit="batch") as bar:
            for number in range(self.config.passes):
                results: dict[str, list[Result]] = defaultdict(list)
                for at, (_, rows) in enumerate(self.batches):
                    names = list(methods)
                    turn = (number + at) % len(names)
                    for name in names[turn:] + names[:turn]:
                        results[name].append(Result(rows, self.decode(programs[name], methods[name], rows)))
                        bar.update()
                done.append(results)
        return done

    def parity(self, programs: dict[str, Decoder], methods: dict[str, Method]) -> dict[str, list[list[int]]]:
        """Each method's program and parameters with nothing drafted: autoregressive decoding, bit for bit comparable."""
        same: dict[tuple, list[list[int]]] = {}
        outputs: dict[str, list[list[int]]] = {name: [] for name in methods}
        for _, rows in tqdm(self.batches, desc="parity", leave=False):
            same.clear()
            for name, method in methods.items():
                shape = jax.tree.structure(method.drafter_params(np.zeros(self.config.batch, int) - 1))
                mixed_batch = name not in ("autoregressive", "base", "mixed") and self.config.batch > 1
                kind = (id(programs[name]), shape, mixed_batch)
                if kind not in same:
                    timed = self.decode(programs[name], method, rows, draft_limit=0)
                    same[kind] = [c.ids for c in timed.completions]
                outputs[name] += same[kind]
        return outputs


def _check(config: Bench) -> None:
    for name in config.methods:
        if name not in METHODS:
            raise UserError(f"--methods {name}: no such method; choose among {', '.join(METHODS)}")
    if config.num_speculative_tokens is not None and not 1 <= config.num_speculative_tokens <= MAX_DRAFT:
        raise UserError(f"--num-speculative-tokens {config.num_speculative_tokens} must lie between 1 and {MAX_DRAFT}")
    if config.json and not Path(config.json).absolute().parent.is_dir():
        raise UserError(f"--json {config.json}: its folder does not exist; make it first")


def _asks(config: Bench, pool: Pool) -> list[Ask]:
    source = config.prompts or str(pool.path / TEST)
    include = config.include or (tuple(pool.facts["include"]) if config.prompts and Path(source).is_dir() else ())
    room = pool.pair.longest - config.max_new_tokens
    taken: dict[str, int] = defaultdict(int)
    asks, too_long = [], 0
    for number, line in enumerate(read_prompts(source, include=include)):
        task = line.task or "all"
        if config.limit is not None and taken[task] >= config.limit:
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
        asks.append(Ask(line, request, task, _oracle(pool, line)))
    if too_long:
        print(f"bench: {too_long} prompts longer than {room} tokens were left out")
    if not asks:
        raise UserError(f"{source}: no prompt of at most {room} tokens")
    return asks


def _oracle(pool: Pool, line: Line) -> int:
    """The drafter whose cluster's majority label is the line's, the largest of them; the line's own cluster without labels."""
    own = [t for t, label in enumerate(pool.facts["labels"]) if label is not None and label == line.task]
    if own:
        return max(own, key=lambda t: pool.facts["sizes"][t])
    return line.settings.get("cluster", BASE)


def _batches(asks: Sequence[Ask], config: Bench):
    by_task: dict[str, list[int]] = defaultdict(list)
    for i, ask in enumerate(asks):
        by_task[ask.task].append(i)
    for task, rows in by_task.items():
        for part in group([asks[i].request for i in rows], config.batch, config.smallest_bucket):
            yield task, [rows[i] for i in part]


def _methods(config: Bench, pool: Pool, asks: Sequence[Ask], current: list[int], heard: list) -> dict[str, Method]:
    tasks = len(pool.tasks)
    rng = np.random.default_rng(config.seed)
    random = rng.integers(tasks, size=len(asks))
    oracle = np.array([ask.oracle for ask in asks])
    wrong = np.where(tasks > 1, (oracle + rng.integers(1, max(tasks, 2), size=len(asks))) % tasks, BASE)
    beforehand = {"random": random, "wrong": wrong, "oracle": oracle}
    made = {}
    for name in dict.fromkeys(("autoregressive", *config.methods)):
        if name == "routed":
            made[name] = serving.routed(pool, lambda route, probability: heard.append((route, probability)))
        elif name in beforehand:
            made[name] = serving.given(pool, name, lambda own=beforehand[name]: own[current])
        else:
            made[name] = serving.unrouted(pool, name)
    return made


def _fastest(work: Work, method: Method, sampled: bool) -> tuple[int, Decoder]:
    """The width at which autoregressive decoding of a few prompts is fastest; the median of three tries a width."""
    sample = [rows for _, rows in work.batches[:: max(1, len(work.batches) // 3)]][:3]
    programs = {width: serving.autoregressive(work.pool, width, sampled=sampled) for width in work.config.widths}
    tries: dict[int, list[float]] = {width: [] for width in programs}
    for number in range(4):
        for width, program in programs.items():
            seconds = sum(work.decode(program, method, rows).decode_seconds for rows in sample)
            if number:
                tries[width].append(seconds)
    best = min(tries, key=lambda width: statistics.median(tries[width]))
    return best, programs[best]


def _figures(config: Bench, pool: Pool, asks, passes, parity, width: int, k: int) -> dict:
    rows_of: dict[str, list[int]] = defaultdict(list)
    for i, ask in enumerate(asks):
        rows_of[ask.task].append(i)
    names = list(passes[0])
    by_row = {name: [_by_row(results[name]) for results in passes] for name in names}
    tasks = {task: {name: _row(name, rows, by_row, parity) for name in names} for task, rows in rows_of.items()}
    parted = _first_differences(pool, asks, by_row, parity)
    mean = {name: _mean([tasks[task][name] for task in tasks]) for name in names}
    return {
        "schema": 1,
        "device": jax.devices()[0].device_kind,
        "dtype": config.dtype or pool.facts["dtype"],
        "batch": config.batch,
        "num_speculative_tokens": k,
        "temperature": config.temperature,
        "commit": _commit(),
        "pool": str(config.pool),
        "autoregressive_width": width,
        "max_new_tokens": config.max_new_tokens,
        "passes": config.passes,
        "versions": {"jax": jax.__version__},
        "tasks": tasks,
        "mean": mean,
        "first_differences": parted,
    }


class RowTime(NamedTuple):
    """A prompt's completion and its share of its batch's seconds."""

    completion: Completion
    prefill: float
    decode: float

    @property
    def seconds(self) -> float:
        return self.prefill + self.decode


def _by_row(results: list[Result]) -> dict[int, RowTime]:
    found = {}
    for rows, timed in results:
        share = 1 / len(rows)
        prefill = (timed.prefill_seconds + timed.route_seconds) * share
        for i, completion in zip(rows, timed.completions, strict=True):
            found[i] = RowTime(completion, prefill, timed.decode_seconds * share)
    return found


def _row(name: str, rows: list[int], by_row: dict, parity: dict) -> dict:
    """One method on one task."""
    last = by_row[name][-1]
    figures = metrics.measures(metrics.total([last[i].completion.counts for i in rows]))
    median = lambda get: statistics.median(sum(get(one[i]) for i in rows) for one in by_row[name])
    equal = lambda ids: float(np.mean([last[i].completion.ids == ids(i) for i in rows]))
    fastest = by_row["autoregressive"][-1]
    return {
        "prompts": len(rows),
        "seconds": median(lambda t: t.seconds),
        "prefill_seconds": median(lambda t: t.prefill),
        "decode_seconds": median(lambda t: t.decode),
        **figures,
        "equal_to_autoregressive": equal(lambda i: parity[name][i]) if parity else None,
        "equal_to_fastest_autoregressive": equal(lambda i: fastest[i].completion.ids) if parity else None,
        "speedup_vs_autoregressive": _speedup(by_row, "autoregressive", name, rows),
        "speedup_vs_base": _speedup(by_row, "base", name, rows),
    }


def _speedup(by_row: dict, against: str, name: str, rows: list[int]) -> float | None:
    """Median over passes of the ratio of totals over a task's prompts; tokens a second where lengths differ."""
    if against not in by_row:
        return None
    rate = lambda one: sum(len(one[i].completion.ids) for i in rows) / sum(one[i].seconds for i in rows)
    return statistics.median(rate(a) / rate(b) for a, b in zip(by_row[name], by_row[against], strict=True))


def _mean(rows: list[dict]) -> dict:
    """Plain mean over tasks of every figure that has a value in all of them."""
    out = {}
    for key, first in rows[0].items():
        values = [row[key] for row in rows]
        if any(value is None for value in values):
            out[key] = None
        elif isinstance(first, list):
            out[key] = np.mean(values, axis=0).tolist()
        else:
            out[key] = float(np.mean(values))
    return out


def _first_differences(pool: Pool, asks, by_row: dict, parity: dict) -> list[dict]:
    """Where the timed autoregressive program and the one of the methods' width part, with the two logits there."""
    if not parity:
        return []
    timed = by_row["autoregressive"][-1]
    other = next((name for name in parity if name != "autoregressive"), "autoregressive")
    parted = []
    for i, ask in enumerate(asks):
        a, b = timed[i].completion.ids, parity[other][i]
        if a != b:
            at = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            parted.append({"id": ask.line.id, "task": ask.task, "position": at, **_two_logits(pool, ask, a, b, at)})
    return parted


def _two_logits(pool: Pool, ask: Ask, a: list[int], b: list[int], at: int) -> dict:
    if at >= min(len(a), len(b)):
        return {"tokens": None, "logits": None}
    ids = [*ask.request.ids, *a[:at]]
    tokens = np.zeros((1, bucket_of(len(ids))), np.int32)
    tokens[0, : len(ids)] = ids
    target = pool.pair.target
    hidden = forward(target.config, target.params, tokens)[:, len(ids) - 1]
    logits = np.asarray(unembed(target.config, target.params, hidden))[0]
    return {"tokens": [a[at], b[at]], "logits": [float(logits[a[at]]), float(logits[b[at]])]}


def _router(pool: Pool, asks, batches, heard, passes, number: int) -> dict | None:
    if not heard or "routed" not in passes[0]:
        return None
    route = np.full(len(asks), BASE)
    for (_, rows), (routes, _) in zip(batches, heard, strict=False):
        route[rows] = routes
    labels = pool.facts["labels"]
    known = [i for i, ask in enumerate(asks) if ask.task in labels or "cluster" in ask.line.settings]
    right = [_right(pool, asks[i], route[i]) for i in known]
    agree = [route[i] == asks[i].line.settings["cluster"] for i in known if "cluster" in asks[i].line.settings]
    timed = [result.timed for results in passes for result in results["routed"]]
    milliseconds = [1e3 * t.route_seconds / len(t.completions) for t in timed]
    first = [t.prefill_seconds + t.route_seconds for t in timed]
    tasks = sorted({ask.task for ask in asks})
    counts = [
        [sum(ask.task == task and int(route[i]) == t for i, ask in enumerate(asks)) for t in _columns(pool)]
        for task in tasks
    ]
    return {
        "accuracy": float(np.mean(right)) if right else None,
        "agreement_with_partition": float(np.mean(agree)) if agree else None,
        "milliseconds": statistics.median(milliseconds),
        "share_of_time_to_first_token": statistics.median(
            t.route_seconds / f for t, f in zip(timed, first, strict=True)
        ),
        "fallback_rate": float(np.mean(route == BASE)),
        "confusion": {"tasks": tasks, "drafters": [*_names(pool), "base"], "counts": counts},
    }


def _right(pool: Pool, ask: Ask, route: int) -> bool:
    """Whether the drafter's cluster has the prompt's label as its majority; without labels, whether it is its cluster."""
    if route == BASE:
        return False
    if ask.task in pool.facts["labels"]:
        return pool.facts["labels"][route] == ask.task
    return route == ask.line.settings["cluster"]


def _columns(pool: Pool) -> list[int]:
    return [*range(len(pool.tasks)), BASE]


def _names(pool: Pool) -> list[str]:
    labels = pool.facts["labels"]
    return [f"{name} ({label})" if label else name for name, label in zip(pool.tasks, labels, strict=True)]


def _clusters(pool: Pool) -> dict:
    data = read_arrays(pool.path / POINTS)
    return {
        "points": np.round(data["points"], 4).tolist(),
        "cluster": data["cluster"].tolist(),
        "task": [label or None for label in data["label"].tolist()],
        "names": _names(pool),
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
    print(f"{said}, temperature {bench['temperature']}, autoregressive {bench['autoregressive_width']} wide")
    names = list(bench["mean"])
    cell = lambda value, form: format(value, form) if value is not None else "-"
    print("| task | " + " | ".join(f"{name} acc / x AR" for name in names[1:]) + " |")
    print("|---|" + "---|" * len(names[1:]))
    for task, row in [*bench["tasks"].items(), ("**mean**", bench["mean"])]:
        cells = [
            f"{cell(row[name]['draft_accuracy'], '.3f')} / {cell(row[name]['speedup_vs_autoregressive'], '.2f')}"
            for name in names[1:]
        ]
        print(f"| {task} | " + " | ".join(cells) + " |")
    if bench["mean"][names[-1]]["equal_to_autoregressive"] is not None:
        least = min(bench["tasks"][task][name]["equal_to_autoregressive"] for task in bench["tasks"] for name in names)
        print(f"equal to autoregressive decoding through the same program: {least:.4f} at least")
    if bench["router"]:
        router = bench["router"]
        print(
            f"router: accuracy {cell(router['accuracy'], '.3f')}, {router['milliseconds']:.2f} ms a prompt "
            f"({100 * router['share_of_time_to_first_token']:.1f} % of the time to the first token), "
            f"fallback {router['fallback_rate']:.3f}"
        )


if __name__ == "__main__":
    command_line(Bench, run)
