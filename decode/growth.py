"""How what decoding costs grows: with context, tasks in the bank, drafted tokens and vocabulary; prefill; compile time.

    python -m decode.growth --pool runs/mine/pool --output growth.json
    python -m decode.growth --shapes meta-llama/Llama-2-7b-hf JackFram/llama-68m --longest 2048 --output growth.json

From a base point (`--slots` rows of `--cached` tokens, calibration's draft length) one axis at a time is changed, and a whole
iteration of the engine's own program is timed in a chain, by slope. Beside each stands its floor: the bytes that must move
over the bandwidth that this device showed, or the operations over those of a large product, where that is longer. `prefill`
is one prompt that fills its size: tokens per second, model FLOP utilisation (operations over seconds and peak), and with a
pool the time to the first token, which is reading, routing, admission and a round, through the engine. `compile` is what the
programs of a job take to compile in a fresh process, and in a second one that finds them in JAX's persistent cache.

An axis is written when it is measured; the same command goes on with those that are missing.
"""

import statistics
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from decode import compiled, device
from decode.axes import Growth, axes_of, points, values
from decode.chains import Chain
from decode.subjects import check_models, models_of, number_of
from jaxspec import pooled, serving
from jaxspec.config import UserError, command_line
from jaxspec.engine import Engine, Method
from jaxspec.requests import Request, room_of
from jaxspec.roofline import floor
from jaxspec.store.facts import find_pool
from jaxspec.store.loading import load_pool
from jaxspec.store.pool import Pool
from jaxspec.store.stages import read_json, write_json
from jaxspec.timing import paced

SCHEMA = 1
COLUMNS = ("axis", "value", "floor, us", "median, us", "fastest, us", "ratio", "tokens/s", "MFU", "first token, ms")

Row = dict[str, Any]


def run(config: Growth) -> None:
    """Measures the axes that the file lacks, writes each when it is done, and prints all as a table."""
    check_models(config)
    wanted, settings = axes_of(config), _settings(config)
    known = _begun(config, settings)
    todo = [axis for axis in wanted if not _is_finished(config, known, axis)]
    number = settings["num_speculative_tokens"]
    steps = {axis: 1 if axis == "compile" else len(values(config, axis)) for axis in todo}
    with tqdm(total=sum(steps.values()), desc="growth", unit="point") as bar:
        for axis, own in _measured(config, todo, number, bar):
            known["axes"][axis] = own
            if config.output:
                write_json(Path(config.output), known)
    print(table({axis: known["axes"][axis] for axis in wanted}))


def table(axes: dict[str, Row]) -> str:
    """The axes as Markdown: first those that are timed by value, then the programs' compile time."""
    rows = [_cells(axis, row) for axis, own in axes.items() if axis != "compile" for row in own["rows"]]
    said = [f"{own['device']}: {_shown(own)}" for axis, own in axes.items() if axis != "compile"][:1]
    lines = [*said, *_markdown(COLUMNS, rows)] if rows else []
    if "compile" in axes:
        seconds = [
            [row["program"], *(_cell(row[when], 1, 2) for when in ("cold", "cached"))]
            for row in axes["compile"]["rows"]
        ]
        lines += _markdown(("program", "cold, s", "cached, s"), seconds)
    return "\n".join(lines)


def _settings(config: Growth) -> Row:
    """What all axes depend on; no weights are read and no device is asked."""
    _, facts, digest = find_pool(config.pool) if config.pool else (None, {}, "")
    return {
        "models": digest or list(config.shapes),
        "dtype": config.dtype or facts.get("dtype", "bfloat16"),
        "slots": config.slots,
        "cached": config.cached,
        "rank": config.rank,
        "num_speculative_tokens": number_of(config, facts),
    }


def _begun(config: Growth, settings: Row) -> Row:
    """What the file holds of these settings already.

    Raises:
        UserError: no folder for the file, or figures of other settings in it.
    """
    file = Path(config.output)
    if config.output and not file.absolute().parent.is_dir():
        raise UserError(f"--output {config.output}: its folder does not exist; make it first")
    if not (config.output and file.exists()):
        return {"schema": SCHEMA, "settings": settings, "axes": {}}
    found = read_json(file)
    before = found.get("settings") if isinstance(found, dict) else None
    if not isinstance(before, dict):
        raise UserError(f"--output {config.output} holds something else; choose another file")
    for name, own in settings.items():
        if before.get(name) != own:
            raise UserError(
                f"--output {config.output} was measured with {name} {before.get(name)!r}, not {own!r}; choose another file"
            )
    return found


def _is_finished(config: Growth, known: Row, axis: str) -> bool:
    """Whether the file has the axis, with all of its values."""
    rows = known["axes"].get(axis, {}).get("rows", [])
    return bool(rows) and (axis == "compile" or [row["value"] for row in rows] == values(config, axis))


def _measured(config: Growth, axes: list, number: int, bar: tqdm):
    """Each axis with what was measured; models are loaded when compiling, which needs the device, is done."""
    if "compile" in axes:
        named = ("pool", "target", "draft", "dtype", "slots")
        flags = {name: getattr(config, name) for name in named}
        yield "compile", compiled.twice({**flags, "num_speculative_tokens": number, "prompt": config.cached})
        bar.update()
    if timed := [axis for axis in axes if axis != "compile"]:
        pool = _pool(config)
        models = models_of(config, pool)
        known = _device(config, models.dtype)
        for axis in timed:
            rows = []
            begin = _first_tokens(config, pool, number) if pool and axis == "prefill" else None
            for value, chain in points(config, models, number, axis):
                row = {"value": value, **_row(config, chain, known)}
                rows.append(row | _read(row, known, begin) if axis == "prefill" else row)
                bar.update()
            yield axis, {**known, "rows": rows}


def _pool(config: Growth) -> Pool | None:
    return load_pool(config.pool, target=config.target, draft=config.draft, dtype=config.dtype) if config.pool else None


def _device(config: Growth, dtype: Any) -> Row:
    """What floors depend on."""
    known = {"rate": config.bandwidth, "operations": config.peak}
    moved, peak = device.shown(dtype, passes=config.passes, seconds=config.seconds, **known)
    kind, rate = jax.devices()[0].device_kind, moved.best if moved else config.bandwidth
    void = moved is not None and device.is_void(kind, moved.best)
    return {"device": kind, "jax": jax.__version__, "bandwidth": rate, "peak": peak, "void": void}


def _row(config: Growth, chain: Chain, known: Row) -> Row:
    """A program's least work, its floor and what it took."""
    (own,) = paced({0: chain.run}, seconds=config.seconds, passes=config.passes, most={0: chain.most}).values()
    work, least = chain.work, floor(chain.work, known["bandwidth"], known["peak"])
    return {"bytes": work.bytes, "operations": work.operations, "floor": least, **own._asdict()}


def _read(row: Row, known: Row, begin) -> Row:
    """What a prompt's reading comes to."""
    return {
        "tokens_per_second": row["value"] / row["seconds"],
        "flop_utilisation": row["operations"] / row["seconds"] / known["peak"],
        "first_token": begin(row["value"]) if begin else None,
    }


def _first_tokens(config: Growth, pool: Pool, number: int):
    """prompt's tokens -> seconds to the first token of a prompt alone, through a warm engine."""
    engine = pooled.speculative(pool, number, slots=1, room=room_of(values(config, "prefill")[-1], 1))
    method = serving.routed(pool, 1)
    return lambda size: _first_token(engine, method, size, pool.pair.vocab_size, config.passes)


def _first_token(engine: Engine, method: Method, size: int, vocab_size: int, passes: int) -> dict[str, float]:
    """Medians of reading, routing, the rest (admission and one round), and of all of it: prefill emits nothing."""
    ids = tuple(np.random.default_rng(0).integers(0, vocab_size, size).tolist())
    engine.warm_up(method, [size])
    seen = []
    for number in range(passes + 1):
        engine.complete([Request(ids=ids, max_new_tokens=1)], method)
        seen += [engine.seconds] if number else []  # the first merges its task's adapter
    parts = {name: statistics.median(getattr(own, name) for own in seen) for name in seen[0]._fields}
    return {**parts, "seconds": statistics.median(map(sum, seen))}


def _cells(axis: str, row: Row) -> list[str]:
    times = [_cell(row[name], 1e6, 1) for name in ("floor", "seconds", "fastest")]
    first = (row.get("first_token") or {}).get("seconds")
    read = _cell(row.get("tokens_per_second"), 1, 0), _cell(row.get("flop_utilisation"), 1, 3), _cell(first, 1e3, 2)
    return [axis, f"{row['value']:,}", *times, _cell(row["seconds"] / row["floor"], 1, 2), *read]


def _cell(value: float | None, scale: float, digits: int) -> str:
    return "-" if value is None else f"{value * scale:,.{digits}f}"


def _markdown(columns: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (columns, ("---", *["---:"] * (len(columns) - 1)), *rows)]


def _shown(own: Row) -> str:
    void = "; void: it moves too little, free it and run again" if own["void"] else ""
    return f"{own['bandwidth'] / 1e9:.1f} GB/s, {own['peak'] / 1e12:.2f} Top/s{void}"


if __name__ == "__main__":
    command_line(Growth, run)
