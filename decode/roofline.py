"""What is left between the programs of a pool and the machine: what each must move, the floor, what it takes, the ratio.

    python -m decode.roofline --pool runs/mine/pool --output roofline.json
    python -m decode.roofline --config configs/roofline_7b.py

The unit is the ratio to the floor: the bytes that must be read and written (`jaxspec/roofline.py` says which) over the
bandwidth that the device showed in the same run, or the operations over those of a large product, where that is longer. A
ratio of 1 is the machine's best; absolute times belong to one device.

Programs are timed in chains, by slope, in turn; the median counts. A `drafter step` has the caches on the chip to itself;
`within an iteration` it is an iteration less verification, divided by the calls, and reads weights that the target has
evicted. `outside target and drafter` is an iteration less the calls of both: acceptance, caches, tests whether rows have ended.
"""

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from decode import device
from decode.chains import SAMPLED, Chain, iterations, models, reading, scoring
from decode.device import Bandwidth, Launches, NotMeasured
from decode.subjects import Load, Roofline, Subject, subjects
from jaxspec import pooled
from jaxspec.config import UserError, command_line
from jaxspec.roofline import Work, floor
from jaxspec.store.stages import write_json
from jaxspec.timing import MORE, Paced, paced

TRACED = 10  # steps of the shorter chain that is profiled
COLUMNS = (
    "program",
    "slots",
    "MB",
    "Gop",
    "floor, us",
    "median, us",
    "fastest, us",
    "ratio",
    "kernels",
    "between kernels",
)

Timed = tuple[dict[str, Work], dict[str, Paced], dict[str, Launches]]


def run(config: Roofline) -> None:
    """Prints the table and writes the JSON."""
    if config.output and not Path(config.output).absolute().parent.is_dir():
        raise UserError(f"--output {config.output}: its folder does not exist; make it first")
    load, measured = subjects(config)
    seen, timed = [], []
    for own in measured:
        seen = seen or [_device(config, own.dtype)]
        timed.append((own, _timed(config, load, own)))
        seen.append(_device(config, own.dtype))  # before and after, as the machine may be busier at one time
    conditions = _conditions(config, load, timed[0][0].dtype, seen)
    rows = [row for own, found in timed for row in _rows(load, own, found, conditions)]
    if config.output:
        write_json(Path(config.output), {**conditions, "programs": rows})
    print(_said(conditions))
    print(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown; a dash stands for what a program has not or was not measured."""
    lines = [COLUMNS, ("---", *["---:"] * (len(COLUMNS) - 1)), *map(_cells, rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _device(config: Roofline, dtype: Any) -> tuple[Bandwidth | None, float]:
    """What the device shows at this moment of what the user has not given: bandwidth, and operations per second."""
    known = {"rate": config.bandwidth, "operations": config.peak}
    return device.shown(dtype, passes=config.passes, seconds=config.seconds, **known)


def _conditions(
    config: Roofline, load: Load, dtype: Any, seen: Sequence[tuple[Bandwidth | None, float]]
) -> dict[str, Any]:
    """What the figures depend on; of what the device showed the best counts."""
    moved, own = [one for one, _ in seen if one], jax.devices()[0]
    best = Bandwidth(max(one.read for one in moved), max(one.copy for one in moved), moved[0].size) if moved else None
    rate = best.best if best else config.bandwidth
    return {
        "device": own.device_kind,
        "platform": own.platform,
        "versions": {"jax": jax.__version__, "numpy": np.__version__, "python": platform.python_version()},
        "dtype": jnp.dtype(dtype).name,
        "models": list(config.shapes) or config.pool,
        **load._asdict(),
        "bandwidth": rate,
        "bandwidth_measured": best and best._asdict(),
        "peak": max(peak for _, peak in seen),
        "peak_measured": config.peak is None,
        "void": best is not None and device.is_void(own.device_kind, best.best),
    }


def _timed(config: Roofline, load: Load, own: Subject) -> Timed:
    """One subject's programs: the least that each must do, what it took and what it launched."""
    programs = _programs(config, load, own)
    most = {name: chain.most for name, chain in programs.items()}
    runs = {name: chain.run for name, chain in programs.items()}
    taken = paced(runs, seconds=config.seconds, passes=config.passes, most=most)
    launched = _launched(programs, {name: min(pace.steps, TRACED) for name, pace in taken.items()})
    return {name: chain.work for name, chain in programs.items()}, taken, launched


def _rows(load: Load, own: Subject, timed: Timed, conditions: dict[str, Any]) -> list[dict[str, Any]]:
    """One subject's rows: its programs, and what follows from them."""
    works, taken, launched = timed
    rows = []
    for name, work in works.items():
        least = floor(work, conditions["bandwidth"], conditions["peak"])
        row = {"program": name, "slots": own.slots, "bytes": work.bytes, "operations": work.operations, "floor": least}
        row |= {**taken[name]._asdict(), "ratio": taken[name].seconds / least}
        rows.append(row | _kernels(launched.get(name)))
    return rows + _differences(load, own, {row["program"]: row for row in rows})


def _programs(config: Roofline, load: Load, own: Subject) -> dict[str, Chain]:
    """Every program that is measured in so many slots, by name."""
    widths = sorted({1, pooled.idle_width(), *config.widths, load.number + 1})
    first, plainest = next(iter(own.drafters.items()))
    call = lambda config, params, width: scoring(config, own.dtype, params, own.slots, width, load)
    drafter = plainest.params.weights
    return {
        **{_target(width): call(own.shape, own.target, width) for width in widths},
        "drafter step": call(own.draft, drafter, 1),
        **({f"prefill, 1 x {load.bucket} tokens": reading(own, load)} if own.slots == config.slots[0] else {}),
        f"target and drafter, K = {load.number}": models(own, plainest, load),
        "iteration, nothing drafted": iterations(own, None, load),
        **{_iteration(name): iterations(own, who, load) for name, who in own.drafters.items()},
        _iteration(first, sampled=True): iterations(own, plainest, load, SAMPLED),
    }


def _differences(load: Load, own: Subject, rows: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What no program takes alone: a drafter's step within an iteration, and what is neither target nor drafter."""
    first = next(iter(own.drafters))
    iteration, calls = _iteration(first), f"target and drafter, K = {load.number}"
    step = {name: rows["drafter step"][name] for name in ("bytes", "operations", "floor")}
    spent = _less(rows[iteration], rows[_target(load.number + 1)], load.number)
    within = {**step, **spent, "ratio": spent["seconds"] / step["floor"]}
    sampled = _less(rows[_iteration(first, sampled=True)], rows[calls])
    known = {
        "drafter step within an iteration": within,
        "outside target and drafter": _less(rows[iteration], rows[calls]),
        "outside target and drafter, top-k and top-p": sampled,
    }
    empty = dict.fromkeys(("bytes", "operations", "floor", "ratio", "steps", "kernels", "between_kernels"))
    return [{"program": name, "slots": own.slots, **empty, **figures} for name, figures in known.items()]


def _less(whole: Mapping[str, float], part: Mapping[str, float], among: int = 1) -> dict[str, float]:
    """Seconds of the whole without the part, in so many equal shares."""
    return {name: (whole[name] - part[name]) / among for name in ("seconds", "fastest")}


def _launched(programs: Mapping[str, Chain], steps: Mapping[str, int]) -> dict[str, Launches]:
    """What a step of each program launches; nothing on a CPU, and nothing more once a profile could not be read."""
    found: dict[str, Launches] = {}
    try:
        for name, chain in programs.items() if jax.default_backend() != "cpu" else ():
            found[name] = device.launches(chain.run, steps[name], MORE * steps[name])
    except NotMeasured as error:
        print(f"kernels were not measured: {error}")
    return found


def _kernels(own: Launches | None) -> dict[str, float | None]:
    return {"kernels": own and own.number, "between_kernels": own and own.between}


def _target(width: int) -> str:
    return f"target, {width} wide"


def _iteration(drafter: str, sampled: bool = False) -> str:
    return f"iteration, {drafter}" + (", top-k and top-p" if sampled else "")


def _cells(row: dict[str, Any]) -> list[str]:
    cell = lambda name, scale, digits: "-" if row[name] is None else f"{row[name] * scale:,.{digits}f}"
    return [
        row["program"],
        str(row["slots"]),
        cell("bytes", 1e-6, 1),
        cell("operations", 1e-9, 2),
        cell("floor", 1e6, 1),
        cell("seconds", 1e6, 1),
        cell("fastest", 1e6, 1),
        cell("ratio", 1, 2),
        cell("kernels", 1, 0),
        cell("between_kernels", 1, 2),
    ]


def _said(conditions: dict[str, Any]) -> str:
    """The device's own figures, and whether they void the rest."""
    own, rate = conditions["bandwidth_measured"], conditions["bandwidth"] / 1e9
    how = (
        f"read {own['read'] / 1e9:.1f}, copy {own['copy'] / 1e9:.1f}, over {own['size'] / 1e9:.1f} GB"
        if own
        else "given"
    )
    kind = (
        f"{conditions['device']}, {conditions['dtype']}, {conditions['context']} tokens cached of {conditions['room']}"
    )
    said = f"{kind}; {rate:.1f} GB/s ({how}); {conditions['peak'] / 1e12:.2f} Top/s"
    wanted = (
        f"void: {conditions['device']} moves {device.LEAST_H200 / 1e12} TB/s when it is free; free it and run again"
    )
    return f"{said}\n{wanted}" if conditions["void"] else said


if __name__ == "__main__":
    command_line(Roofline, run)
