"""The pools of a bench: its own, and rivals of the same target that are measured beside it under a name of their own."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from decode.figures import Ask
from jaxspec.config import UserError
from jaxspec.store.families import Place, place
from jaxspec.store.loading import load_beside
from jaxspec.store.names import METHODS, extra_file
from jaxspec.store.pool import Pool

Row = TypeVar("Row")


class Contender(NamedTuple):
    """A pool in a bench.

    name: the rival's, empty for the bench's own pool; methods: those that are measured, without prefix; asks: the prompts,
    each with its cluster in this pool.
    """

    name: str
    pool: Pool
    methods: tuple[str, ...]
    asks: Sequence[Ask]

    def row(self, method: str) -> str:
        """A method's name in the tables; a rival's `routed` is the rival."""
        if not self.name:
            return method
        return self.name if method == "routed" else f"{self.name}/{method}"

    def own(self, rows: Mapping[str, Row]) -> dict[str, Row]:
        """Of all methods this pool's, by their names without prefix."""
        return {method: rows[self.row(method)] for method in self.methods}


def parse(said: Sequence[str], pool: str) -> list[Place]:
    """The rivals that `--rivals` names; UserError for a form that will not do, or a name that bench has already."""
    rivals: dict[str, Place] = {}
    for each in said:
        own = place("--rivals", each)
        if own.name in METHODS or own.name in rivals or extra_file(Path(pool), own.name).exists():
            raise UserError(f"--rivals {each}: bench or the pool has the name {own.name!r} already; give another")
        rivals[own.name] = own
    return list(rivals.values())


def measured(methods: Sequence[str], rivals: Sequence[Place], pool: str) -> dict[str, tuple[str, ...]]:
    """Which methods of each pool are measured, by its name; UserError for one that it does not have."""
    folders = {rival.name: rival.pool for rival in rivals}
    found = {"": ["autoregressive"], **{name: ["routed"] for name in folders}}
    for said in methods:
        name, _, method = said.partition("/")
        if name in folders:  # autoregressive decoding is the target's alone, the same for all pools
            fits = not method or (method != "autoregressive" and _has(folders[name], method))
        else:
            name, method, fits = "", said, _has(pool, said)
        if not fits:
            raise UserError(
                f"--methods {said}: no such method; choose among {', '.join(METHODS)} and what `train.adopt` has added, "
                "and of a rival all but autoregressive as NAME/METHOD"
            )
        found[name].append(method or "routed")
    return {name: tuple(dict.fromkeys(own)) for name, own in found.items()}


def load(rivals: Sequence[Place], pool: Pool) -> dict[str, Pool]:
    """The rivals' pools by name; they share the weights of the target."""
    return {rival.name: _load(rival, pool) for rival in rivals}


def _load(rival: Place, pool: Pool) -> Pool:
    try:
        return load_beside(rival.pool, pool, rival.draft)
    except UserError as error:
        raise UserError(f"--rivals {rival.name}: {error}") from error


def _has(pool: str, method: str) -> bool:
    return method in METHODS or extra_file(Path(pool), method).exists()
