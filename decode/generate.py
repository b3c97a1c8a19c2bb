"""Completes a file of prompts with a pool: one JSON line a prompt, appended and synced as they come.

    python -m decode.generate --pool runs/testbed/pool --input prompts.jsonl --output out.jsonl

A job that was killed, preempted (SIGTERM) or ran out of disk goes on where its output ends, and every prompt is answered
once. A prompt that cannot be answered becomes a record with `error`; the others are answered all the same, and the exit
code is 2.
"""

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import jax

from decode import answers, asked, job, records, tables
from decode.asked import Known
from decode.job import Generate
from jaxspec import prepared, sharding
from jaxspec.config import UserError, command_line
from jaxspec.plan import GIB, Load, device_memory, fit, table
from jaxspec.requests import bucket_of
from jaxspec.store.loading import load_pool
from jaxspec.store.parts import alone, merge, own_rows, part_file, same_job, unfinished
from jaxspec.store.pool import Pool
from jaxspec.store.prompts import Fault, Line, read_lines
from jaxspec.store.recalibration import elsewhere
from jaxspec.text import Ask


def run(config: Generate) -> None:
    """Appends the records that the output lacks."""
    process, processes = job.place(config)
    job.check(config)
    lines = read_lines(config.input)
    own, output = own_rows(len(lines), process, processes), _output(config, process, processes)
    mine = lines[own.start : own.stop]
    records.resume(output, mine, config.order)
    known = asked.know(config.pool, config.target, config.draft)
    asks = asked.requests(known, lines, vars(config), online=config.online)
    judging = {"online": config.online, "reliability": config.reliability}
    tables.check(lines, asks, config.drafter, config.table, output, judging)
    pool = _pool(config, known, asks, sharding.asked(config.mesh, jax.local_devices() if processes > 1 else None))
    with open(output, "ab") as out, records.preemptible() as preempted:
        alone(out, output)
        same_job(output, job.unchanging(config, known, asks))
        answered, size = records.resume(output, mine, config.order)
        os.truncate(output, size)
        share = answers.begun(config, pool, output, own, lines, asks)
        todo = [i for i in range(len(own)) if i not in answered]
        found = records.in_order(share.lines, share.asks, todo, answers.completions(share, todo), config.order)
        done = records.write(out, found, len(own), len(answered), preempted)
        share.write()
    _tell(share.watch.report())
    if done < len(own):
        _leave(config, done, len(own))
    _end(Path(config.output), output, processes, own, lines, asks)


def _output(config: Generate, process: int, processes: int) -> Path:
    """The file that this process writes."""
    if Path(config.output).resolve().is_relative_to(Path(config.input).resolve()):
        raise UserError(f"--output {config.output} lies in --input {config.input}; choose another place")
    return part_file(Path(config.output), process, processes)


def _pool(config: Generate, known: Known, asks: Sequence[Ask | str], mesh: jax.sharding.Mesh | None) -> Pool:
    """The pool, once it is known that it fits."""
    load = _load(config, known, asks)
    memory = device_memory() if config.mesh.memory is None else int(config.mesh.memory * GIB)
    rows = fit(known.target, known.draft, load, mesh or sharding.abstract_mesh(1, 1), memory)
    if config.explain:
        print(table(rows))
    pool = load_pool(config.pool, target=config.target, draft=config.draft, dtype=config.dtype, mesh=mesh)
    if config.num_speculative_tokens is None and not tables.wanted(config.drafter, asks):
        _tell(elsewhere(pool.facts, config.pool))
    return pool


def _load(config: Generate, known: Known, asks: Sequence[Ask | str]) -> Load:
    """What the job keeps in memory, with all processes' requests."""
    facts = known.facts
    requests = [ask.request for ask in asks if isinstance(ask, Ask)]
    dtype, tasks, whole = config.dtype or facts["dtype"], len(facts["tasks"]), 3 if facts["trunk"] else 2
    lora = facts["specialists"] == "bank_lora"
    alone = config.batch == 1 or not lora or prepared.stacks(known.draft, tasks, dtype)
    merged = tasks + 2 + config.batch if config.online else tasks + 1 if alone else 0  # online each row has its own
    return Load(
        batch=config.batch,
        prompt_tokens=max((len(r.ids) for r in requests), default=1),
        max_new_tokens=bucket_of(max((r.max_new_tokens for r in requests), default=1)),
        num_speculative_tokens=job.drafted(config, facts, asks),
        dtype=dtype,
        tasks=tasks,
        rank=facts["rank"] if lora else 0,
        drafters=whole + merged + len(asked.outside(facts, asks)),
        drafter_caches=tasks + 3 if config.online else 1,  # of all, and a row's own
        logprobs=config.logprobs,
        prefill_rows=-(-config.admit_rows // config.mesh.data) * config.mesh.data,  # rows that do not divide are whole
    )


def _tell(said: str | None) -> None:
    if said:
        print(f"generate: {said}", file=sys.stderr)


def _leave(config: Generate, done: int, total: int) -> NoReturn:
    """Ends a process that was given notice."""
    said = f"preempted: {done} of {total} prompts answered; run the same command again to go on"
    print(said, file=sys.stderr, flush=True)
    if config.distributed:  # an orderly end waits for the other hosts, which have hours to go
        os._exit(128 + signal.SIGTERM)
    sys.exit(128 + signal.SIGTERM)


def _end(
    whole: Path, part: Path, processes: int, own: range, lines: Sequence[Line | Fault], asks: Sequence[Ask | str]
) -> None:
    """Says what was answered, and merges the parts when all processes have; UserError where prompts were not answered."""
    faults = {i: asks[i] for i in own if isinstance(asks[i], str)}
    print(f"generate: {len(own) - len(faults)} of {len(own)} prompts answered in {part}")
    if processes > 1 and not unfinished(whole, len(lines), processes):
        merge(whole, len(lines), processes)
        print(f"generate: the parts of all {processes} processes are merged in {whole}")
    if faults:
        first = min(faults)
        raise UserError(f"{len(faults)} prompts were not answered, the first at {lines[first].source}: {faults[first]}")


if __name__ == "__main__":
    command_line(Generate, run)
