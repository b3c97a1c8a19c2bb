"""Who answers a process's prompts: with which engine and method, in which turns, and what is learnt on the way.

Prompts whose lines name whole drafters, which the rows' bank has not, are served in turns of their own; the others share one
method. What finished texts teach, of who should begin others and of what may be relied on, changes drafts and no text but
those that p/q rejection samples.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from decode import asked, tables
from decode.compiled import explain
from decode.job import Generate, drafted
from decode.kept import Kept
from decode.unexplained import Watch
from jaxspec import pooled, recording, serving
from jaxspec.engine import Engine, Method
from jaxspec.experience import Experience
from jaxspec.reliability import Reliability
from jaxspec.store.families import options
from jaxspec.store.pool import Pool
from jaxspec.store.prompts import Fault, Line
from jaxspec.text import Ask, Completion, serve

TURN = 256  # prompts that are served before others where some name whole drafters and records keep the prompts' order
ROUNDS = 32  # between two looks at stop strings and at a notice of preemption


class Share(NamedTuple):
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

    def route(self, i: int) -> int | None:
        """The drafter that prompt `i` names."""
        return ask.request.route if isinstance(ask := self.asks[i], Ask) else None

    def write(self) -> None:
        """Leaves beside the output what was learnt."""
        self.kept.write()
        if self.tables:
            self.tables.write()


def begun(
    config: Generate, pool: Pool, output: Path, own: range, lines: Sequence[Line | Fault], asks: Sequence[Ask | str]
) -> Share:
    """The rows `own` of a job's lines, and what the records that are written already have taught."""
    mine = lines[own.start : own.stop], asks[own.start : own.stop]
    watch, kept = Watch(pool, output), Kept(pool, output, config.replay or 0)
    learnt = tables.begun(pool, output, config.table, *mine) if tables.wanted(config.drafter, asks) else None
    return Share(config, pool, *mine, asked.room(asks), watch, kept, _remembered(config, pool, output), learnt)


def completions(share: Share, todo: Sequence[int]) -> Iterator[tuple[int, Completion] | None]:
    """(prompt's number, completion) of these that have requests, as they come; None where rows only went on."""
    todo = [i for i in todo if isinstance(share.asks[i], Ask)]
    for found in _in_turns(share, todo) if todo else ():
        if found:
            i, completion = found
            share.watch.see(share.lines[i], completion)
            share.kept.see(share.lines[i], completion)
        yield found


def _in_turns(share: Share, todo: Sequence[int]) -> Iterator[tuple[int, Completion] | None]:
    config, pool = share.config, share.pool
    length = drafted(config, pool.facts, share.asks)
    engine = _engine(share, length)
    outside = [] if config.online else asked.outside(pool.facts, share.asks)
    method = _method(share, length, outside)
    apart = {route: serving.outside(pool, route, config.batch, method) for route in outside}
    trust = Reliability(pool.facts, length)
    method = trust.over(method) if config.reliability else share.experience.over(method) if share.experience else method
    for turn in _turns(todo, apart, config.order):
        for route, own in apart.items():  # first, so that what was ready long ago waits for none of these
            if rows := [i for i in turn if share.route(i) == route]:
                yield from _served(share, engine, own, rows)
                engine.release()
        for found in _served(share, engine, method, [i for i in turn if share.route(i) not in apart]):
            if found:
                _learn(share, trust, length, *found)
            yield found
        if apart:
            engine.release()
    if config.reliability and (failed := [pool.names[route] for route in trust.left_out()]):
        print(f"generate: {', '.join(failed)} had less accepted than {pool.names[-1]} would; left out", file=sys.stderr)
    if config.explain:
        explain(engine)


def _engine(share: Share, length: int) -> Engine:
    """The programs of rounds of so many drafted tokens."""
    config, pool, (room, kind) = share.config, share.pool, share.room
    recorders = [recording.logprobs(room)] if config.logprobs else []
    if length and (config.remember or config.replay):
        recorders.append(recording.choices(len(pooled.candidates(pool))))
    # What tables draft is not drawn, so that neither rule accepts more, and by the other one no text depends on them.
    rule = "gumbel" if share.tables else config.acceptance
    return (pooled.adapting if share.tables else pooled.online if config.online else pooled.speculative)(
        pool,
        length,
        "greedy" if kind == "greedy" else rule,
        slots=config.batch,
        room=room,
        admit_rows=config.admit_rows,
        recorder=recording.together(*recorders) if recorders else recording.NOTHING,
    )


def _method(share: Share, length: int, outside: Sequence[int]) -> Method:
    """Who drafts for prompts that name none of the drafters `outside`."""
    pool, slots = share.pool, share.config.batch
    if share.tables:
        return share.tables.method
    if share.config.online:
        return serving.hedging(pool, slots)
    named = any(share.route(i) is not None and share.route(i) not in outside for i in range(len(share.asks)))
    # Of one length the choice is the same for any batch, as the records must be.
    return serving.chosen(pool, slots, options(pool.facts, length, slots), bank=named)


def _turns(todo: Sequence[int], apart: Mapping[int, Method], order: str) -> list[Sequence[int]]:
    """The prompts as they are served one after another: in parts where records would wait for whole drafters' turns."""
    size = TURN if apart and order == "input" else len(todo)
    return [todo[i : i + size] for i in range(0, len(todo), size)]


def _served(
    share: Share, engine: Engine, method: Method, rows: Sequence[int]
) -> Iterator[tuple[int, Completion] | None]:
    """(prompt's number, completion) of these rows; None where rows only went on."""
    asks = [ask for i in rows if isinstance(ask := share.asks[i], Ask)]
    for piece in serve(share.pool, engine, method, asks, rounds=ROUNDS):
        yield (rows[piece.index], piece.completion) if piece.completion else None


def _learn(share: Share, trust: Reliability, length: int, i: int, own: Completion) -> None:
    """Learns of a text who should begin others, and who can be relied on."""
    pool, ask = share.pool, share.asks[i]
    if share.experience:
        _remember(share.experience, pool, vars(own))
    if share.tables and isinstance(ask, Ask):
        share.tables.saw(ask.request.ids, own.token_ids)
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
        task, began = pool.tasks.index(said["task"]), pooled.candidates(pool).index(said["drafter"])
        experience.saw(task, said["route_confidence"], began, said["log_weights"])
