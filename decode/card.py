"""Query and correct, counted: what verdicts find in the cache, tokens a target call, and a simulated timeline of two devices.

    python -m decode.card --pool runs/testbed/pool --prompts ../shared/data/eval --limit 2 --layers 2 4 8 --json card.json

Tokens and outcomes are those of the schedule, on one device as on two, whatever either takes. How long rounds would take
side by side is simulated from a target call and a drafter call, which are measured here in turn, or given: a round lasts as
long as the longer of its target call and its drafter calls. `--apart` runs it so, on a mesh for each, and measures rounds.
Source: CARD, https://arxiv.org/abs/2508.04462.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from decode.bench import Prepared, prepare
from decode.figures import Result
from decode.methods import check_cache
from decode.settings import Bench, Card
from jaxspec import metrics, pooled, serving, sharding
from jaxspec.candidates import HIT, MISS, PARTIAL
from jaxspec.config import UserError, command_line
from jaxspec.engine import Engine
from jaxspec.requests import bucket_of, room_of
from jaxspec.store.facts import draft_length
from jaxspec.store.stages import write_json
from jaxspec.timing import timed

OUTCOMES = {"hit": HIT, "partial": PARTIAL, "miss": MISS}
SAMPLE = 4  # prompts that components are timed on


def run(config: Card) -> None:
    """Prints the tables and writes the JSON."""
    _check(config)
    meshes = sharding.sides(config.mesh, config.draft_mesh) if config.apart else None
    slots = math.lcm(config.mesh.data, config.draft_mesh.data)
    same = ("pool", "prompts", "limit", "num_speculative_tokens", "temperature", "max_new_tokens", "seed", "dtype")
    asked = {name: getattr(config, name) for name in (*same, "target", "draft", "mesh")}
    prepared = prepare(Bench(**asked, methods=("card",), widths=(1,), layers=config.layers[0], batch=slots))
    pool = prepared.contenders[0].pool
    k = draft_length(pool.facts, config.num_speculative_tokens, least=1, slots=slots)
    shapes = [(layers, nodes) for layers in config.layers for nodes in config.layer_nodes]
    engines = {shape: _engine(prepared, k, *shape) for shape in shapes}
    times = _times(config, prepared, engines, k)
    if meshes:
        engines = {shape: _engine(prepared, k, *shape, meshes) for shape in shapes}
    measured = _timed(prepared, engines, config.passes) if meshes else {}
    rows = [_row(prepared, engine, shape, times[shape], measured.get(shape)) for shape, engine in engines.items()]
    said = {name: getattr(config, name) or "measured" for name in ("target_milliseconds", "drafter_milliseconds")}
    devices = _devices(meshes)
    _print(rows, k, said, devices)
    if config.json:
        known = {"pool": config.pool, "device": jax.devices()[0].device_kind, "num_speculative_tokens": k}
        known |= {"temperature": config.temperature, "limit": config.limit, "milliseconds": said}
        write_json(Path(config.json), {**known, "slots": slots, "apart": devices, "rows": rows})


def simulated(
    rounds: np.ndarray, tokens: int, target_milliseconds: float, drafter_milliseconds: float
) -> dict[str, float]:
    """Tokens per second, and the share of drafting that verification hides, were rounds to take what their calls take.

    `side_by_side` is the schedule on two devices, `in_turn` the same rounds on one, `autoregressive` a token a target call.

    Args:
        rounds: `[n + 1]` how many had 0 to n drafter calls; tokens: that all of them emitted.
    """
    drafting = drafter_milliseconds * np.arange(len(rounds))
    whole = float(rounds @ drafting)
    rate = lambda milliseconds: float(1e3 * tokens / (rounds @ milliseconds))
    return {
        "target_milliseconds": target_milliseconds,
        "drafter_milliseconds": drafter_milliseconds,
        "hidden": float(rounds @ np.minimum(drafting, target_milliseconds)) / whole if whole else 0.0,
        "side_by_side": rate(np.maximum(drafting, target_milliseconds)),
        "in_turn": rate(drafting + target_milliseconds),
        "autoregressive": 1e3 / target_milliseconds,
    }


def _row(
    prepared: Prepared, engine: Engine, shape: tuple[int, int], times: tuple[float, float], measured: dict | None
) -> dict[str, Any]:
    """Figures of all prompts together, by task, simulated, and what of the engine is measured."""
    by_task: dict[str, list[Result]] = defaultdict(list)
    for task, prompts in prepared.work.batches:
        by_task[task].append(prepared.work.decode(engine, "card", prompts))
    of_all = [own for results in by_task.values() for own in results]
    tasks = {task: _figures(own) for task, own in by_task.items()}
    timeline = simulated(_record(of_all).sum(0), int(_total(of_all).num_emitted), *times)
    layers, nodes = shape
    own = {"layers": layers, "layer_nodes": nodes, **_figures(of_all), "tasks": tasks}
    return own | {"simulated": timeline, "measured": measured}


def _figures(results: Sequence[Result]) -> dict[str, Any]:
    """Shares of rounds by what their verdict found, and what they emitted."""
    record, own = _record(results), metrics.measures(_total(results))
    rounds = int(record.sum())
    calls = float(record.sum(0) @ np.arange(record.shape[1]) / rounds)
    return {
        "rounds": rounds,
        **{name: float(record[outcome].sum() / rounds) for name, outcome in OUTCOMES.items()},
        **{name: own[name] for name in ("tokens", "mean_acceptance_length", "draft_accuracy")},
        "drafter_calls_a_round": calls,
    }


def _record(results: Sequence[Result]) -> np.ndarray:
    """`[3, layers + 1]` rounds by outcome and by layers that were added."""
    return np.sum([completion.record for result in results for completion in result.completions], axis=0)


def _total(results: Sequence[Result]) -> metrics.Counts:
    return metrics.total(completion.counts for result in results for completion in result.completions)


def _check(config: Card) -> None:
    own = config.draft_mesh
    if not config.apart and own.data * own.model > 1:
        raise UserError(
            f"--draft-mesh of data={own.data} x model={own.model} goes with --apart; add it, or leave the mesh out"
        )
    for layers in config.layers:
        for nodes in config.layer_nodes:
            check_cache(Bench(pool=config.pool, layers=layers, layer_nodes=nodes))
    for name in ("target_milliseconds", "drafter_milliseconds"):
        if (value := getattr(config, name)) is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')} {value} will not do; give a number above 0, or leave it out")


def _engine(prepared: Prepared, k: int, layers: int, nodes: int, meshes: tuple[Mesh, Mesh] | None = None) -> Engine:
    """The bench's program of such a cache."""
    work = prepared.work
    rule = "rejection" if work.config.temperature > 0 else "greedy"
    longest = bucket_of(max(len(ask.request.ids) for ask in work.asks))
    shape: dict[str, Any] = {"slots": work.config.batch, "room": room_of(longest, work.config.max_new_tokens)}
    pool = prepared.contenders[0].pool
    return pooled.querying(pool, k, rule, layers=layers, width=nodes, meshes=meshes, **shape)


def _times(config: Card, prepared: Prepared, engines: Mapping[tuple[int, int], Engine], k: int) -> dict:
    """Milliseconds of a target call and of a drafter call, for every shape of the cache, given or measured.

    Measured are rounds in turn on this device: of K + 1 columns that nobody drafts for, and, for a drafter call, what a round
    with its layers takes beyond these, a layer.
    """
    given = config.target_milliseconds, config.drafter_milliseconds
    if None not in given:
        return {shape: given for shape in engines}
    pool, known = prepared.contenders[0].pool, next(iter(engines.values()))
    plain = pooled.autoregressive(pool, k + 1, slots=known.slots, room=known.room)
    ways: dict[Any, Any] = {"target": (plain, serving.always(pool, "autoregressive", known.slots))}
    took = {way: own["round_milliseconds"] for way, own in _timed(prepared, engines, config.passes, ways).items()}
    target = config.target_milliseconds or took["target"]
    a_layer = lambda shape: max(took[shape] - took["target"], 0.0) / shape[0]
    return {shape: (target, config.drafter_milliseconds or a_layer(shape)) for shape in engines}


def _timed(
    prepared: Prepared, engines: Mapping[Any, Engine], passes: int, others: Mapping = MappingProxyType({})
) -> dict:
    """What `timing.timed` says of the engines, and of other ways beside them, on a few prompts."""
    slots = prepared.work.config.batch
    routed = serving.routed(prepared.contenders[0].pool, slots)
    requests = [prepared.work.asks[rows[0]].request for _, rows in prepared.work.batches][: max(SAMPLE, slots)]
    return timed({**others, **{way: (engine, routed) for way, engine in engines.items()}}, requests, passes)


def _devices(meshes: tuple[Mesh, Mesh] | None) -> dict[str, str] | None:
    """What the halves run on, in words."""
    if meshes is None:
        return None
    said = lambda mesh: f"{mesh.size} x {mesh.devices.flat[0].device_kind}"
    return {name: said(mesh) for name, mesh in zip(("target", "drafter"), meshes, strict=True)}


def _print(rows: Sequence[dict], k: int, said: Mapping[str, Any], devices: Mapping[str, str] | None) -> None:
    print(f"chains of at most {k} tokens")
    print("| layers | nodes | hit | partial | miss | tokens a target call | draft accuracy | drafter calls a round |")
    print("|---:|" + "---:|" * 7)
    for row in rows:
        shares = " | ".join(f"{row[name]:.3f}" for name in OUTCOMES)
        accuracy = "-" if row["draft_accuracy"] is None else f"{row['draft_accuracy']:.3f}"
        own = f"{row['mean_acceptance_length']:.2f} | {accuracy} | {row['drafter_calls_a_round']:.2f}"
        print(f"| {row['layers']} | {row['layer_nodes']} | {shares} | {own} |")
    print(
        f"simulated, target call {said['target_milliseconds']}, drafter call {said['drafter_milliseconds']} (milliseconds)"
    )
    print(
        "| layers | nodes | target, ms | drafter, ms | drafting hidden | side by side, tokens/s | in turn | autoregressive |"
    )
    print("|---:|" + "---:|" * 7)
    for row in rows:
        own = row["simulated"]
        times = f"{own['target_milliseconds']:.2f} | {own['drafter_milliseconds']:.2f} | {own['hidden']:.3f}"
        rates = " | ".join(f"{own[name]:.1f}" for name in ("side_by_side", "in_turn", "autoregressive"))
        print(f"| {row['layers']} | {row['layer_nodes']} | {times} | {rates} |")
    if devices:
        print(
            f"measured, target on {devices['target']}, drafter on {devices['drafter']} at once, prefill in tokens/s alone"
        )
        print("| layers | nodes | rounds/s | tokens/s |\n|---:|" + "---:|" * 3)
        for row in rows:
            own = row["measured"]
            rates = f"{1e3 / own['round_milliseconds']:.1f} | {own['tokens_per_second']:.1f}"
            print(f"| {row['layers']} | {row['layer_nodes']} | {rates} |")


if __name__ == "__main__":
    command_line(Card, run)
