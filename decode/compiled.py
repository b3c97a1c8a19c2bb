"""Seconds that a pool's programs take to compile, in this process; `decode.growth` starts it with and without a filled cache.

    python -m decode.compiled --pool runs/mine/pool --output compiled.json

The programs are those of a job that drafts: prefill, admission and rounds of `--slots` rows. What JAX keeps of earlier
processes (`JAX_COMPILATION_CACHE_DIR`) counts as it helps.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax

from jaxspec import pooled, serving
from jaxspec.config import UserError, command_line
from jaxspec.engine import Engine
from jaxspec.requests import bucket_of, room_of
from jaxspec.store.facts import draft_length
from jaxspec.store.loading import load_pool
from jaxspec.store.stages import read_json, write_json

CACHE = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}


@dataclass(frozen=True, kw_only=True)
class Compiling:
    """What is compiled."""

    pool: str
    """Folder of the pool."""
    output: str
    """File for the JSON."""
    target: str = ""
    """Another place of the pool's target."""
    draft: str = ""
    """Another place of the pool's base drafter."""
    dtype: Literal["", "float32", "bfloat16"] = ""
    """float32 or bfloat16; empty is what the pool was made with."""
    slots: int = 8
    """Rows decoded together."""
    prompt: int = 128
    """Tokens of the prompts, padded to their bucket."""
    num_speculative_tokens: int | None = None
    """Tokens drafted a round; None is what calibration chose."""


def run(config: Compiling) -> None:
    """Writes the device, and of every program its seconds."""
    if not Path(config.output).absolute().parent.is_dir():
        raise UserError(f"--output {config.output}: its folder does not exist; make it first")
    pool = load_pool(config.pool, target=config.target, draft=config.draft, dtype=config.dtype)
    k = draft_length(pool.facts, config.num_speculative_tokens, least=1, slots=config.slots)
    bucket = bucket_of(config.prompt)
    shape: dict[str, Any] = {"slots": config.slots, "room": room_of(bucket, bucket)}
    engine = pooled.speculative(pool, k, **shape)
    engine.warm_up(serving.routed(pool, config.slots), [bucket])
    seconds = {", ".join(filter(None, program)): own for program, own in by_program(engine).items()}
    write_json(Path(config.output), {"device": jax.devices()[0].device_kind, "programs": seconds})


def by_program(engine: Engine) -> dict[tuple[str, str], float]:
    """Seconds of compiling by name and shape; a program that was compiled for two layouts of its arguments is one."""
    seconds: dict[tuple[str, str], float] = defaultdict(float)
    for own in engine.compiled:
        seconds[own.name, own.shape] += own.seconds
    return seconds


def explain(engine: Engine) -> None:
    """Prints the programs that an engine has compiled."""
    seconds = by_program(engine)
    print(f"{len(seconds)} programs for {engine.slots} slots of {engine.room} tokens:")
    for (name, shape), spent in seconds.items():
        print(f"  {name:8} {shape:24} {spent:7.2f} s")


def twice(flags: dict[str, Any]) -> dict[str, Any]:
    """Compiles in two fresh processes, the second with the cache that the first has filled.

    Args:
        flags: those of this command, `output` aside.

    Returns:
        `device`, and `rows` of program, `cold` and `cached` seconds; the last row is the whole process.
    """
    said = [
        word
        for name, own in flags.items()
        if own not in ("", None)
        for word in (f"--{name.replace('_', '-')}", str(own))
    ]
    with tempfile.TemporaryDirectory() as folder:
        runs = {when: _fresh(Path(folder), said) for when in ("cold", "cached")}
    cold, cached = runs.values()
    of = lambda name: {when: own["programs"].get(name) for when, own in runs.items()}
    rows = [{"program": name, **of(name)} for name in cold["programs"]]
    whole = {"program": "the whole process", "cold": cold["seconds"], "cached": cached["seconds"]}
    return {"device": cold["device"], "rows": [*rows, whole]}


def _fresh(folder: Path, flags: list[str]) -> dict[str, Any]:
    """What a new process says, and its seconds from start to end."""
    output, cache = folder / "compiled.json", {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
    command, start = [sys.executable, "-m", "decode.compiled", *flags, "--output", str(output)], time.perf_counter()
    done = subprocess.run(command, env=os.environ | CACHE | cache, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        raise UserError(f"compiling in a process of its own failed: {' '.join(last).removeprefix('error: ')}")
    return read_json(output) | {"seconds": time.perf_counter() - start}


if __name__ == "__main__":
    command_line(Compiling, run)
