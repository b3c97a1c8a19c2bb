"""What is asked of a pool: what is known of it before its weights are read, and a line made a request or the reason why not.

A prompt that is too long, or a line that cannot be read, is a reason; a setting that means nothing is the user's mistake.
"""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxspec.config import UserError
from jaxspec.requests import MAX_DRAFT, SETTINGS, Request, checked
from jaxspec.store.facts import find_pool
from jaxspec.store.families import routes_outside
from jaxspec.store.huggingface import read_config, read_tokenizer
from jaxspec.store.models import encode
from jaxspec.store.prompts import Fault, Line
from jaxspec.text import Ask, drafter_named, room_for
from jaxspec.transformer import LMConfig

KEYS = (*SETTINGS, "stop", "drafter")


class Known(NamedTuple):
    """What is known of a pool before its weights are read."""

    facts: dict[str, Any]
    digest: str
    target: LMConfig
    draft: LMConfig
    tokenizer: Any

    @property
    def positions(self) -> int:
        """Tokens of the longest text that target and drafters can read."""
        return min(self.target.max_positions, self.draft.max_positions)


def know(pool: str, target: str, draft: str) -> Known:
    """What is known of the pool in this folder, whose models lie elsewhere where a place is given."""
    _, facts, digest = find_pool(pool)
    target, draft = target or facts["target"]["path"], draft or facts["draft"]["path"]
    return Known(facts, digest, read_config(target), read_config(draft), read_tokenizer(target))


def requests(
    known: Known, lines: Sequence[Line | Fault], defaults: Mapping[str, Any], *, online: bool
) -> list[Ask | str]:
    """The lines' requests, or why they cannot be answered.

    Args:
        defaults: `SETTINGS` and `drafter` of lines that do not give their own.
        online: whether rows change their drafters.

    Raises:
        UserError: a line has a key or a value that means nothing.
    """
    return [_ask(known, number, line, defaults, online) for number, line in enumerate(lines)]


def outside(facts: Mapping[str, Any], asks: Sequence[Ask | str]) -> list[int]:
    """The whole drafters that lines name, by their routes: rows of those that the bank has cannot have them."""
    routes = {ask.request.route for ask in asks if isinstance(ask, Ask)}
    return sorted(route for route in routes_outside(facts).values() if route in routes)


def room(asks: Sequence[Ask | str]) -> tuple[int, str]:
    """Room and rule's kind over all processes' requests, so that a text does not depend on how many share the job."""
    requests = [ask.request for ask in asks if isinstance(ask, Ask)]
    return room_for(requests), "sampled" if any(request.temperature > 0 for request in requests) else "greedy"


def _ask(known: Known, number: int, line: Line | Fault, defaults: Mapping[str, Any], online: bool) -> Ask | str:
    if isinstance(line, Fault):
        return line.reason
    unknown = line.settings.keys() - {*KEYS, "cluster"}
    if unknown:
        raise UserError(f"{line.source}: unknown key {sorted(unknown)[0]!r}; a line may have {', '.join(KEYS)}")
    try:
        own = _settings(known.facts, line, defaults, online)
    except UserError as error:
        raise UserError(f"{line.source}: {error}") from error
    stops = _stops(line)
    try:
        ids = encode(known.tokenizer, line)
    except UserError as error:
        return str(error).removeprefix(f"{line.source}: ")
    most = known.positions - own["max_new_tokens"]
    if len(ids) > most:
        return f"prompt of {len(ids)} tokens is longer than {most}, the models' positions less max_new_tokens"
    return Ask(Request(ids=ids, number=_stream_of(line, number), **own), stops)


def _settings(facts: dict[str, Any], line: Line, defaults: Mapping[str, Any], online: bool) -> dict[str, Any]:
    """Fields of the line's request."""
    given = {name: value for name, value in line.settings.items() if value is not None}
    own = {name: checked(name, given.get(name, defaults[name])) for name in SETTINGS}
    most = own.pop("num_speculative_tokens")
    own["draft_limit"] = MAX_DRAFT if most is None else most
    own["route"] = drafter_named(facts, given.get("drafter", defaults["drafter"] or None))
    if online:
        _check_begins(facts, own["route"])
    return own


def _check_begins(facts: Mapping[str, Any], route: int | None) -> None:
    """Refuses a line's drafter that is none of those that rows change between, see `pooled.candidates`."""
    others = routes_outside(facts)
    name = next((name for name, own in others.items() if own == route and name != "mixed"), None)
    if name:
        raise UserError(
            f"no row can begin with the drafter {name!r} where rows change theirs; name a task or mixed, or leave out --online"
        )


def _stops(line: Line) -> tuple[str, ...]:
    stops = line.settings.get("stop") or []
    stops = stops if isinstance(stops, list) else [stops]
    if not all(isinstance(stop, str) for stop in stops):
        raise UserError(f"{line.source}: stop {line.settings['stop']!r} will not do; give a text or a list of texts")
    return tuple(stops)


def _stream_of(line: Line, number: int) -> int:
    """The name of a line's random stream: of its id where it has one, so that lines may come in any order, else its place."""
    return number if line.id == line.source else zlib.crc32(line.id.encode()) & 0x7FFFFFFF
