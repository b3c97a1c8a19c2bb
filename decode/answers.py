"""Who answers a process's prompts: with which engine and method, and in which turns.

Prompts whose lines name whole drafters, which the rows' bank has not, are served in turns of their own; the others share one
method.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from decode import asked, learnt
from decode.compiled import explain
from decode.job import Generate, drafted
from decode.kept import Kept
from decode.learnt import Learnt
from decode.unexplained import Watch
from jaxspec import pooled, recording, serving
from jaxspec.engine import Engine, Method
from jaxspec.store.families import options
from jaxspec.store.pool import Pool
from jaxspec.store.prompts import Fault, Line
from jaxspec.text import Ask, Completion, serve

TURN = 256  # prompts that are served before others where some name whole drafters and records keep the prompts' order
ROUNDS = 32  # between two looks at stop strings and at a notice of preemption


class Share(NamedTuple):
    """What a process answers: its lines, their requests or why there is none, and the room that all processes' need."""

    config: Generate
    pool: Pool
    lines: Sequence[Line | Fault]
    asks: Sequence[Ask | str]
    room: tuple[int, str]
    watch: Watch
    kept: Kept
    learnt: Learnt

    def route(self, i: int) -> int | None:
        """The drafter that prompt `i` names."""
        return ask.request.route if isinstance(ask := self.asks[i], Ask) else None

    def write(self) -> None:
        """Leaves beside the output what was learnt."""
        self.kept.write()
        self.learnt.write()


def begun(
    config: Generate, pool: Pool, output: Path, own: range, lines: Sequence[Line | Fault], asks: Sequence[Ask | str]
) -> Share:
    """The rows `own` of a job's lines, with what the records that are written already have taught."""
    mine = lines[own.start : own.stop], asks[own.start : own.stop]
    known = learnt.begun(config, pool, output, *mine, drafted(config, pool.facts, asks))
    return Share(
        config, pool, *mine, asked.room(asks), Watch(pool, output), Kept(pool, output, config.replay or 0), known
    )


def completions(share: Share, todo: Sequence[int]) -> Iterator[tuple[int, Completion] | None]:
    """(prompt's number, completion) of these that have requests, as they come; None where rows only went on."""
    todo = [i for i in todo if isinstance(share.asks[i], Ask)]
    for found in _in_turns(share, todo) if todo else ():
        if found:
            i, completion = found
            share.watch.see(share.lines[i], completion)
            share.kept.see(share.lines[i], completion)
            share.learnt.saw(i, vars(completion))
        yield found


def _in_turns(share: Share, todo: Sequence[int]) -> Iterator[tuple[int, Completion] | None]:
    config, pool = share.config, share.pool
    engine = _engine(share)
    outside = [] if config.online else asked.outside(pool.facts, share.asks)
    method = _method(share, outside)
    apart = {route: serving.outside(pool, route, config.batch, method) for route in outside}
    method = share.learnt.over(method)
    for turn in _turns(todo, apart, config.order):
        for route, own in apart.items():  # first, so that what was ready long ago waits for none of these
            if rows := [i for i in turn if share.route(i) == route]:
                yield from _served(share, engine, own, rows)
                engine.release()
        yield from _served(share, engine, method, [i for i in turn if share.route(i) not in apart])
        if apart:
            engine.release()
    share.learnt.tell()
    if config.explain:
        explain(engine)


def _engine(share: Share) -> Engine:
    config, pool, (room, kind) = share.config, share.pool, share.room
    length, tables = share.learnt.length, share.learnt.tables
    recorders = [recording.logprobs(room)] if config.logprobs else []
    if length and (config.remember or config.replay):
        recorders.append(recording.choices(len(pooled.candidates(pool))))
    # What tables draft is not drawn, so that neither rule accepts more, and by the other one no text depends on them.
    rule = "gumbel" if tables else config.acceptance
    return (pooled.adapting if tables else pooled.online if config.online else pooled.speculative)(
        pool,
        length,
        "greedy" if kind == "greedy" else rule,
        slots=config.batch,
        room=room,
        admit_rows=config.admit_rows,
        recorder=recording.together(*recorders) if recorders else recording.NOTHING,
    )


def _method(share: Share, outside: Sequence[int]) -> Method:
    """Who drafts for prompts that name none of the drafters `outside`."""
    pool, slots = share.pool, share.config.batch
    if share.learnt.tables:
        return share.learnt.tables.method
    if share.config.online:
        return serving.hedging(pool, slots)
    named = any(share.route(i) is not None and share.route(i) not in outside for i in range(len(share.asks)))
    # Of one length the choice is the same for any batch, as the records must be.
    return serving.chosen(pool, slots, options(pool.facts, share.learnt.length, slots), bank=named)


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
