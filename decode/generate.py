"""Completes a file of prompts with a pool: one JSON line a prompt, appended and synced as they come.

    python -m decode.generate --pool runs/testbed/pool --input prompts.jsonl --output out.jsonl

A job that was killed, preempted (SIGTERM) or ran out of disk goes on where its output ends, and every prompt is answered
once. A prompt that cannot be answered becomes a record with `error`; the others are answered all the same, and the exit
code is 2.
"""

import json
import os
import signal
import sys
import time
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import jax
from tqdm import tqdm

from decode import tables
from decode.kept import Kept
from decode.unexplained import Watch
from jaxspec import pooled, prepared, recording, serving, sharding
from jaxspec.config import Mesh, UserError, command_line
from jaxspec.engine import Engine, Method
from jaxspec.experience import Experience
from jaxspec.plan import GIB, Load, device_memory, fit, table
from jaxspec.reliability import Reliability
from jaxspec.requests import MAX_DRAFT, SETTINGS, Request, bucket_of, checked
from jaxspec.store.facts import draft_length, find_pool
from jaxspec.store.families import drafter_name, options, routes_outside
from jaxspec.store.huggingface import read_config, read_tokenizer
from jaxspec.store.loading import load_pool
from jaxspec.store.models import encode
from jaxspec.store.names import digest_of_added
from jaxspec.store.parts import alone, merge, own_rows, part_file, same_job, unfinished
from jaxspec.store.pool import Pool
from jaxspec.store.prompts import Fault, Line, read_lines
from jaxspec.store.recalibration import elsewhere
from jaxspec.text import Ask, Completion, drafter_named, nodes_of_tables, room_for, serve
from jaxspec.transformer import LMConfig

SAME = ("order", *SETTINGS, "acceptance", "logprobs", "dtype")  # what a job that goes on must not change
LATER = ("online", "remember", "reliability", "drafter")  # the same, of jobs that were begun with one of them
TURN = 256  # prompts that are served before others where some name whole drafters and records keep the prompts' order
BEGIN = b'{"id": '  # of every record
UNSAID = ("index", "num_accepted_tokens_per_pos", "features")
KEYS = (*SETTINGS, "stop", "drafter")
ROUNDS = 32  # between two looks at stop strings and at a notice of preemption
SYNC = 1.0  # seconds of records that a power cut may cost


@dataclass(frozen=True, kw_only=True)
class Generate:
    """A batch job; a line's own settings go before these."""

    pool: str
    """Folder of the pool."""
    input: str
    """Prompts: a .jsonl or .jsonl.gz file or a folder of them."""
    output: str
    """File for the completions."""
    order: Literal["input", "completed"] = "input"
    """Records in the order of the prompts, or as they are completed, which holds none back."""
    batch: int = 8
    """Slots: prompts decoded together; a finished one's slot is filled again."""
    admit_rows: int = 1
    """Prompts read together when slots fall free; more suits accelerators."""
    max_new_tokens: int = 128
    """Longest completion, in tokens."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""
    acceptance: Literal["rejection", "gumbel"] = "rejection"
    """Rule above temperature 0: p/q rejection, or Gumbel coupling, whose text does not depend on the drafter."""
    top_k: int | None = None
    """Sample among so many tokens."""
    top_p: float | None = None
    """Sample among the likeliest tokens of this mass."""
    seed: int = 0
    """Seed of sampling."""
    num_speculative_tokens: int | None = None
    """Tokens drafted a round, 0 for none; None is what calibration chose for the batch."""
    drafter: str = ""
    """Drafter of the lines that name none: a task or its label, `trunk` or `base`, or `adaptive`, trigram tables in place of a
    model, for all lines or for none: of each prompt and its text, and of earlier ones, which OUT.trigrams.npz keeps. What
    records say of drafts then depends on the prompts before, and no text does. Empty leaves it to the router."""
    table: str = ""
    """With `adaptive`: a file that such a job has left, to begin with in place of the pool's table."""
    online: bool = False
    """Change a row's drafter within its text for the one that the target agrees with most; a record's drafter is then the one
    that it began with."""
    remember: bool = False
    """With --online: a prompt begins with the drafter that the target agreed with most in earlier texts of its task. What
    records say of drafts, and text that p/q rejection samples, then depends on the prompts before."""
    replay: int | None = None
    """With --online: keep features of so many prompts, and what each drafter would have had accepted, in OUT.replay.npz, from
    which `train.refresh` mends a router that traffic has left behind."""
    reliability: bool = False
    """Leave out specialists that have less accepted than the trunk would. What records say of drafts, and text that p/q
    rejection samples, then depends on the prompts before."""
    logprobs: bool = False
    """Record the target's log probability of each token: as it is, and after the sampling settings."""
    explain: bool = False
    """Print the programs that were compiled, their shapes and seconds."""
    dtype: Literal["", "float32", "bfloat16"] = ""
    """float32 or bfloat16; empty is what the pool was made with."""
    target: str = ""
    """Another place of the pool's target."""
    draft: str = ""
    """Another place of the pool's base drafter."""
    mesh: Mesh = field(default_factory=Mesh)
    """The devices of this process; the slots divide over `data`."""
    processes: int = 1
    """Processes that share the job; each answers its own run of prompts into a part of the output."""
    process: int = 0
    """Which of them this is, from 0."""
    distributed: bool = False
    """Take both from jax.distributed: the same command on every worker of a TPU pod slice."""


def run(config: Generate) -> None:
    """Appends the records that the output lacks."""
    process, processes = _place_in_job(config)
    if config.online and config.reliability:
        raise UserError(
            "--online judges drafters within each text, --reliability by whole texts of one; give one of them"
        )
    for flag in ("remember", "replay"):
        if getattr(config, flag) and not config.online:
            raise UserError(f"--{flag} needs --online, which judges all drafters along every text; give both")
    lines = read_lines(config.input)
    own = own_rows(len(lines), process, processes)
    output = part_file(Path(config.output), process, processes)
    if Path(config.output).resolve().is_relative_to(Path(config.input).resolve()):
        raise UserError(f"--output {config.output} lies in --input {config.input}; choose another place")
    _resume(config, output, lines[own.start : own.stop])
    known = _know(config)
    asks = [_ask(config, known, number, line) for number, line in enumerate(lines)]
    judging = {"online": config.online, "reliability": config.reliability}
    tables.check(lines, asks, config.drafter, config.table, output, judging)
    of_tables = tables.wanted(config.drafter, asks)
    pool = _pool(config, known, asks, sharding.asked(config.mesh, jax.local_devices() if processes > 1 else None))
    if config.num_speculative_tokens is None and not of_tables and (said := elsewhere(pool.facts, config.pool)):
        print(f"generate: {said}", file=sys.stderr)
    with open(output, "ab") as out, preemptible() as preempted:
        alone(out, output)
        same_job(output, _settings(config, known, asks) | _by_lines(config, known, asks))
        answered, size = _resume(config, output, lines[own.start : own.stop])
        os.truncate(output, size)
        watch, kept = Watch(pool, output), Kept(pool, output, config.replay or 0)
        mine = lines[own.start : own.stop], asks[own.start : own.stop]
        learnt = tables.begun(pool, output, config.table, *mine) if of_tables else None
        job = _Job(config, pool, *mine, _room(asks), watch, kept, _remembered(config, pool, output), learnt)
        done = _write(out, _records(job, answered), len(own), len(answered), preempted)
        kept.write()
        if learnt:
            learnt.write()
    if said := watch.report():
        print(f"generate: {said}", file=sys.stderr)
    if done < len(own):
        said = f"preempted: {done} of {len(own)} prompts answered; run the same command again to go on"
        print(said, file=sys.stderr, flush=True)
        if config.distributed:  # an orderly end waits for the other hosts, which have hours to go
            os._exit(128 + signal.SIGTERM)
        sys.exit(128 + signal.SIGTERM)
    faults = {i: asks[i] for i in own if isinstance(asks[i], str)}
    print(f"generate: {len(own) - len(faults)} of {len(own)} prompts answered in {output}")
    if processes > 1 and not unfinished(Path(config.output), len(lines), processes):
        merge(Path(config.output), len(lines), processes)
        print(f"generate: the parts of all {processes} processes are merged in {config.output}")
    if faults:
        first = min(faults)
        raise UserError(f"{len(faults)} prompts were not answered, the first at {lines[first].source}: {faults[first]}")


class _Job(NamedTuple):
    """What a process answers: its lines, their requests or why there is none, and the room that all processes' need.

    experience: what earlier texts say of who should begin; None where nothing is remembered.
    tables: what drafts in place of models; None where models do.
    """

    config: Generate
    pool: Pool
    lines: Sequence[Line | Fault]
    asks: Sequence[Ask | str]
    room: tuple[int, str]
    watch: Watch
    kept: Kept
    experience: Experience | None
    tables: tables.Tables | None


def _place_in_job(config: Generate) -> tuple[int, int]:
    if config.distributed:
        sharding.start()
        return jax.process_index(), jax.process_count()
    if not 0 <= config.process < config.processes:
        raise UserError(f"--process {config.process} is out of range; give a number from 0 to {config.processes - 1}")
    return config.process, config.processes


class _Known(NamedTuple):
    """What is known of a pool before its weights are read."""

    facts: dict[str, Any]
    digest: str
    target: LMConfig
    draft: LMConfig
    tokenizer: Any


def _know(config: Generate) -> _Known:
    _, facts, digest = find_pool(config.pool)
    target, draft = (getattr(config, name) or facts[name]["path"] for name in ("target", "draft"))
    return _Known(facts, digest, read_config(target), read_config(draft), read_tokenizer(target))


def _length(config: Generate, facts: dict[str, Any], asks: Sequence[Ask | str]) -> int:
    """Tokens that are drafted a round."""
    if tables.wanted(config.drafter, asks):
        return nodes_of_tables(config.num_speculative_tokens)
    return draft_length(facts, config.num_speculative_tokens, slots=config.batch)


def _settings(config: Generate, known: _Known, asks: Sequence[Ask | str]) -> dict[str, Any]:
    """What the records depend on, the prompts apart; the programs only where they round differently enough to matter."""
    length = _length(config, known.facts, asks)
    same = {name: getattr(config, name) for name in SAME} | {"pool": known.digest, "num_speculative_tokens": length}
    # None as in jobs that were begun before there was a choice
    same |= {name: getattr(config, name) or None for name in LATER}
    same |= {"table": tables.begins_as(config.pool, config.table) if tables.wanted(config.drafter, asks) else None}
    same |= {"replay": config.replay is not None or None}  # how many are kept is no matter of the records
    if (config.dtype or known.facts["dtype"]) == "float32":
        return same
    programs = {"batch": config.batch, "admit_rows": config.admit_rows, "mesh": [config.mesh.data, config.mesh.model]}
    return same | programs | {"device": jax.devices()[0].device_kind}


def _by_lines(config: Generate, known: _Known, asks: Sequence[Ask | str]) -> dict[str, Any]:
    """What the records depend on where lines name drafters that were added; None as in jobs that could not."""
    named = [drafter_name(known.facts, route) for route in _outside(known.facts, asks)]
    added = {name: digest_of_added(Path(config.pool), name) for name in named if name in known.facts["added"]}
    return {"added": added or None}


def _outside(facts: Mapping[str, Any], asks: Sequence[Ask | str]) -> list[int]:
    """The whole drafters that lines name, by their routes: rows of those that the bank has cannot have them."""
    routes = {ask.request.route for ask in asks if isinstance(ask, Ask)}
    return sorted(route for route in routes_outside(facts).values() if route in routes)


def _pool(config: Generate, known: _Known, asks: Sequence[Ask | str], mesh: jax.sharding.Mesh | None) -> Pool:
    """The pool, once it is known that it fits."""
    facts, target, draft = known.facts, known.target, known.draft
    requests = [ask.request for ask in asks if isinstance(ask, Ask)]
    dtype, tasks, whole = config.dtype or facts["dtype"], len(facts["tasks"]), 3 if facts["trunk"] else 2
    lora = facts["specialists"] == "bank_lora"
    alone = config.batch == 1 or not lora or prepared.stacks(draft, tasks, dtype)
    merged = tasks + 2 + config.batch if config.online else tasks + 1 if alone else 0  # online each row has its own
    load = Load(
        batch=config.batch,
        prompt_tokens=max((len(r.ids) for r in requests), default=1),
        max_new_tokens=bucket_of(max((r.max_new_tokens for r in requests), default=1)),
        num_speculative_tokens=_length(config, facts, asks),
        dtype=dtype,
        tasks=tasks,
        rank=facts["rank"] if lora else 0,
        drafters=whole + merged + len(_outside(facts, asks)),
        drafter_caches=tasks + 3 if config.online else 1,  # of all, and a row's own
        logprobs=config.logprobs,
        prefill_rows=-(-config.admit_rows // config.mesh.data) * config.mesh.data,  # rows that do not divide are whole
    )
    memory = device_memory() if config.mesh.memory is None else int(config.mesh.memory * GIB)
    rows = fit(target, draft, load, mesh or sharding.abstract_mesh(1, 1), memory)
    if config.explain:
        print(table(rows))
    return load_pool(config.pool, target=config.target, draft=config.draft, dtype=config.dtype, mesh=mesh)


def _room(asks: Sequence[Ask | str]) -> tuple[int, str]:
    """Room and rule's kind over all processes' requests, so that a text does not depend on how many share the job."""
    requests = [ask.request for ask in asks if isinstance(ask, Ask)]
    return room_for(requests), "sampled" if any(request.temperature > 0 for request in requests) else "greedy"


@contextmanager
def preemptible():
    """Yields a function that tells whether SIGTERM, the notice of a preemption, has come."""
    notices: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: notices.append(number))
    try:
        yield lambda: bool(notices)
    finally:
        signal.signal(signal.SIGTERM, before)


def _write(out: IO[bytes], records: Iterator[dict | None], total: int, done: int, preempted) -> int:
    """Appends records, synced every SYNC seconds and at the end; returns how many prompts the output answers."""
    accepted = drafted = tokens = 0
    synced = time.monotonic()
    with tqdm(total=total, initial=done, desc="generate", unit="prompt") as bar:
        for record in records:
            if record is not None:
                out.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
                done += 1
                tokens += len(record.get("token_ids", ()))
                accepted += record.get("num_accepted_tokens", 0)
                drafted += record.get("num_draft_tokens", 0)
                bar.update()
            now = time.monotonic()
            if now - synced > SYNC or preempted():
                _sync(out)
                synced = now
                rate = tokens / max(bar.format_dict["elapsed"], 1e-9)
                bar.set_postfix({"tokens/s": f"{rate:.0f}", "accepted": f"{accepted / max(drafted, 1):.2f}"})
            if preempted():
                break
        _sync(out)
    return done


def _sync(out: IO[bytes]) -> None:
    out.flush()
    os.fsync(out.fileno())


def _records(job: _Job, answered: set[int]) -> Iterator[dict | None]:
    """Records of the prompts that have none, in the wanted order; None where time passes without one."""
    todo = [i for i in range(len(job.lines)) if i not in answered]
    ready = {i: {"id": job.lines[i].id, "error": ask} for i in todo if isinstance(ask := job.asks[i], str)}
    ordered = job.config.order == "input"
    waiting = iter(todo)
    following = next(waiting, None)
    for found in _answers(job, [i for i in todo if isinstance(job.asks[i], Ask)]):
        if found is not None:
            i, completion = found
            ready[i] = _record(job.lines[i], completion)
            job.watch.see(job.lines[i], completion)
            job.kept.see(job.lines[i], completion)
        yield None
        for i in list(ready) if not ordered else ():
            yield ready.pop(i)
        while ordered and following in ready:
            yield ready.pop(following)
            following = next(waiting, None)
    yield from (ready.pop(i) for i in sorted(ready))


def _answers(job: _Job, todo: Sequence[int]) -> Iterator[tuple[int, Completion] | None]:
    """(prompt's number, completion) as they come; None where rows only went on."""
    if not todo:
        return
    config, pool, (room, kind) = job.config, job.pool, job.room
    length = _length(config, pool.facts, job.asks)
    recorders = [recording.logprobs(room)] if config.logprobs else []
    if length and (config.remember or config.replay):
        recorders.append(recording.choices(len(pooled.candidates(pool))))
    # What tables draft is not drawn, so that neither rule accepts more, and by the other one no text depends on them.
    rule = "gumbel" if job.tables else config.acceptance
    engine = (pooled.adapting if job.tables else pooled.online if config.online else pooled.speculative)(
        pool,
        length,
        "greedy" if kind == "greedy" else rule,
        slots=config.batch,
        room=room,
        admit_rows=config.admit_rows,
        recorder=recording.together(*recorders) if recorders else recording.NOTHING,
    )
    outside = [] if config.online else _outside(pool.facts, job.asks)
    route_of = lambda i: ask.request.route if isinstance(ask := job.asks[i], Ask) else None
    named = any(route_of(i) is not None and route_of(i) not in outside for i in range(len(job.asks)))
    # Of one length the choice is the same for any batch, as the records must be.
    among = options(pool.facts, length, config.batch)
    chosen = lambda: serving.chosen(pool, config.batch, among, bank=named)
    method = job.tables.method if job.tables else serving.hedging(pool, config.batch) if config.online else chosen()
    apart = {route: serving.outside(pool, route, config.batch, method) for route in outside}
    trust = Reliability(pool.facts, length)
    method = trust.over(method) if config.reliability else job.experience.over(method) if job.experience else method
    for turn in _turns(todo, apart, config.order):
        for route, own in apart.items():  # first, so that what was ready long ago waits for none of these
            if rows := [i for i in turn if route_of(i) == route]:
                yield from _served(job, engine, own, rows)
                engine.release()
        for found in _served(job, engine, method, [i for i in turn if route_of(i) not in apart]):
            if found:
                _learn(job, trust, length, *found)
            yield found
        if apart:
            engine.release()
    if config.reliability and (failed := [pool.names[route] for route in trust.left_out()]):
        print(f"generate: {', '.join(failed)} had less accepted than {pool.names[-1]} would; left out", file=sys.stderr)
    if config.explain:
        explain(engine)


def _turns(todo: Sequence[int], apart: Mapping[int, Method], order: str) -> list[Sequence[int]]:
    """The prompts as they are served one after another: in parts where records would wait for whole drafters' turns."""
    size = TURN if apart and order == "input" else len(todo)
    return [todo[i : i + size] for i in range(0, len(todo), size)]


def _served(job: _Job, engine: Engine, method: Method, rows: Sequence[int]) -> Iterator[tuple[int, Completion] | None]:
    """(prompt's number, completion) of these rows; None where rows only went on."""
    asks = [ask for i in rows if isinstance(ask := job.asks[i], Ask)]
    for piece in serve(job.pool, engine, method, asks, rounds=ROUNDS):
        yield (rows[piece.index], piece.completion) if piece.completion else None


def _learn(job: _Job, trust: Reliability, length: int, i: int, own: Completion) -> None:
    """Learns of a text who should begin others, and who can be relied on."""
    pool, ask = job.pool, job.asks[i]
    if job.experience:
        _remember(job.experience, pool, vars(own))
    if job.tables and isinstance(ask, Ask):
        job.tables.saw(ask.request.ids, own.token_ids)
    if isinstance(ask, Ask) and own.task and ask.request.draft_limit >= length and ask.request.temperature == 0:
        rounds, tokens = own.num_drafts, len(own.token_ids)  # as calibration was
        trust.saw(pool.names.index(own.drafter), pool.tasks.index(own.task), rounds, tokens)


def _remembered(config: Generate, pool: Pool, output: Path) -> Experience | None:
    """What the records that are written already have taught."""
    if not config.remember:
        return None
    experience = serving.inexperienced(pool)
    for record in map(json.loads, output.read_bytes().splitlines()):
        _remember(experience, pool, record)
    return experience


def _remember(experience: Experience, pool: Pool, said: Mapping[str, Any]) -> None:
    """Learns of a text, by its completion or by its record, which say the same."""
    if said.get("task") and said.get("log_weights"):
        task, begun = pool.tasks.index(said["task"]), pooled.candidates(pool).index(said["drafter"])
        experience.saw(task, said["route_confidence"], begun, said["log_weights"])


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


def _record(line: Line | Fault, completion: Completion) -> dict[str, Any]:
    own = {name: value for name, value in vars(completion).items() if name not in UNSAID and value is not None}
    return {"id": line.id, **own}


def _resume(config: Generate, output: Path, lines: Sequence[Line | Fault]) -> tuple[set[int], int]:
    """Which prompts the output answers already, and where its last whole record ends."""
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: its folder does not exist; make it first")
    place = {line.id: number for number, line in enumerate(lines)}
    if config.order == "completed" and len(place) < len(lines):
        twice = next(line for number, line in enumerate(lines) if place[line.id] != number)
        raise UserError(
            f"{twice.source}: the id {twice.id!r} appears again; give each line its own, or use --order input"
        )
    if not output.exists():
        return set(), 0
    *whole, torn = output.read_bytes().split(b"\n")
    if torn[: len(BEGIN)] != BEGIN[: len(torn)]:
        raise UserError(f"{output} ends with {torn[:40]!r}, which this command did not write; choose another --output")
    if len(whole) > len(lines):
        raise UserError(f"{output} has {len(whole)} records for {len(lines)} prompts; it belongs to another input")
    answered = set()
    for number, record in enumerate(whole):
        own = number if config.order == "input" else place.get(_id_of(record) or "", -1)
        if own < 0 or _id_of(record) != lines[own].id:
            raise UserError(
                f"{output}, line {number + 1} answers another prompt than {lines[number].source}; choose another --output"
            )
        answered.add(own)
    return answered, sum(len(record) + 1 for record in whole)


def _id_of(record: bytes) -> str | None:
    """The id of a record, None for a line that is no record of this command."""
    try:
        own = json.loads(record)
        return own["id"] if own.keys() & {"finish_reason", "error"} else None
    except (ValueError, AttributeError, KeyError):
        return None


def _ask(config: Generate, known: _Known, number: int, line: Line | Fault) -> Ask | str:
    """The line's request, or why it cannot be answered."""
    if isinstance(line, Fault):
        return line.reason
    unknown = line.settings.keys() - {*KEYS, "cluster"}
    if unknown:
        raise UserError(f"{line.source}: unknown key {sorted(unknown)[0]!r}; a line may have {', '.join(KEYS)}")
    own = {name: getattr(config, name) if line.settings.get(name) is None else line.settings[name] for name in SETTINGS}
    try:
        own = {name: checked(name, value) for name, value in own.items()}
        most = own.pop("num_speculative_tokens")
        own["draft_limit"] = MAX_DRAFT if most is None else most
        named = line.settings.get("drafter")
        own["route"] = drafter_named(known.facts, (config.drafter or None) if named is None else named)
        _check_online(config, known.facts, own["route"])
    except UserError as error:
        raise UserError(f"{line.source}: {error}") from error
    stops = line.settings.get("stop") or []
    stops = stops if isinstance(stops, list) else [stops]
    if not all(isinstance(stop, str) for stop in stops):
        raise UserError(f"{line.source}: stop {line.settings['stop']!r} will not do; give a text or a list of texts")
    try:
        ids = encode(known.tokenizer, line)
    except UserError as error:
        return str(error).removeprefix(f"{line.source}: ")
    room = min(known.target.max_positions, known.draft.max_positions) - own["max_new_tokens"]
    if len(ids) > room:
        return f"prompt of {len(ids)} tokens is longer than {room}, the models' positions less max_new_tokens"
    return Ask(Request(ids=ids, number=_stream_of(line, number), **own), tuple(stops))


def _check_online(config: Generate, facts: Mapping[str, Any], route: int | None) -> None:
    """Refuses a line's drafter that is none of those that rows change between, see `pooled.candidates`."""
    others = routes_outside(facts)
    name = next((name for name, own in others.items() if own == route and name != "mixed"), None)
    if config.online and name:
        raise UserError(
            f"no row can begin with the drafter {name!r} where rows change theirs; name a task or mixed, or leave out --online"
        )


def _stream_of(line: Line, number: int) -> int:
    """The name of a line's random stream: of its id where it has one, so that lines may come in any order, else its place."""
    return number if line.id == line.source else zlib.crc32(line.id.encode()) & 0x7FFFFFFF


if __name__ == "__main__":
    command_line(Generate, run)
