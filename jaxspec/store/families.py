"""Families of drafters that a pool chooses among, one prompt at a time: its own, those without weights, other pools' drafters.

A family has one shape and one state. Drafters that were added to the pool have its own; a drafter in a folder is a family of
one, and so are n-gram lookup and trigram tables. What its drafters would have had accepted on the pool's tasks, and what its
rounds take on this device, is measured by `train.calibrate` and kept in the pool's facts under `further`.

Draft lengths count the nodes that the target verifies: a chain's tokens, or all of a tree's. Then a round of one length costs
the target the same whoever drafts, and a table of expected seconds has one row for every drafter and one column a length.
Tables draft trees, which are measured at the lengths of the chains and at as many nodes as they draft where nobody says how
many; that column is infinite for whoever was not measured there.
"""

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxspec import router
from jaxspec.config import UserError
from jaxspec.requests import MAX_DRAFT
from jaxspec.store.facts import calibration, draft_length, expected_seconds, tokens_a_round
from jaxspec.store.loading import load_beside, lone_drafter
from jaxspec.store.names import NAME, TRIGRAMS, drafter_names, measured_names
from jaxspec.store.pool import Pool
from jaxspec.store.stages import MANIFEST, digest_of_file

NGRAM, TABLES = "ngram", "adaptive"
WITHOUT_WEIGHTS = (TABLES, NGRAM)
"""Families of one drafter that nobody trains, which goes on from the text itself, and tables from what they know of others."""


class Place(NamedTuple):
    """What `NAME=POOL` or `NAME=POOL,DRAFT` says: a name, a pool's folder, another place of its base drafter or none.

    The folder may be a drafter's, too, where a family is asked for; there is none for a name of the pool's own.
    """

    name: str
    pool: str
    draft: str


class Options(NamedTuple):
    """What may draft for a prompt.

    alone: whether every prompt may have a drafter and a length of its own.
    lengths: draft lengths, ascending, those of tables too, which count nodes.
    names: of all that were measured, those of the pool's shape first.
    seconds: `[D, T, K]` expected seconds a token by drafter, task and length, infinite where a family does not draft so many;
    rounds where the length was asked for.
    families: (name, lengths) of those that are the fastest on some task; the first, of no name, is the pool's own.
    family: `[D]` index of each drafter's family, -1 for one that is not needed.
    apart: what a round of rows that have drafters of their own takes, over one of rows that share one.
    """

    alone: bool
    lengths: tuple[int, ...]
    names: tuple[str, ...]
    seconds: np.ndarray
    families: tuple[tuple[str, tuple[int, ...]], ...]
    family: np.ndarray
    apart: float = 1.0


def place(flag: str, said: str) -> Place:
    """Reads NAME=POOL or NAME=POOL,DRAFT; UserError for a form that will not do."""
    name, _, places = said.partition("=")
    folder, _, draft = places.partition(",")
    if not (folder and re.fullmatch(NAME, name)):
        raise UserError(
            f"{flag} {said!r} will not do; give NAME=POOL or NAME=POOL,DRAFT, the name in small letters, digits and dashes"
        )
    return Place(name, folder, draft)


def options(facts: Mapping[str, Any], asked: int | None = None, slots: int = 1) -> Options:
    """The pool's own drafters at the length asked for, or at calibration's; with one slot and no wish all that was measured.

    Then the lengths of a family are those that are the fastest on some task with some drafter of it; the fastest of all is
    always among the own.
    """
    names = tuple(drafter_names(facts))
    if asked is not None or slots > 1:
        k = draft_length(facts, asked, slots=slots)
        rounds = router.token_seconds(tokens_a_round(facts, names, [k]), np.ones(1))  # that length may not be measured
        row = calibration(facts, slots).get(k, {}) if slots > 1 else {}  # one row has merged weights, whosever they are
        apart = (
            row["round_milliseconds"] / row["mixed_round_milliseconds"] if "mixed_round_milliseconds" in row else 1.0
        )
        return Options(False, (k,), names, rounds, (("", (k,)),), np.zeros(len(names), int), apart)
    measured = {"": (facts, tuple(measured_names(facts)))}
    measured |= {name: (own, tuple(own["acceptance_length"])) for name, own in facts["further"].items()}
    lengths = tuple(sorted({k for own, _ in measured.values() for k in calibration(own)}))
    seconds = np.concatenate([expected_seconds(own, drafters, lengths) for own, drafters in measured.values()])
    owner = np.repeat(np.arange(len(measured)), [len(drafters) for _, drafters in measured.values()])
    drafter, best = router.fastest(np.eye(len(facts["tasks"])), seconds)
    wins = [{lengths[k] for d, k in zip(drafter, best, strict=True) if owner[d] == i} for i in range(len(measured))]
    wins[0].add(draft_length(facts))
    for i, own in enumerate(wins):
        seconds[np.ix_(owner == i, np.ones(seconds.shape[1], bool), ~np.isin(lengths, sorted(own)))] = np.inf
    needed = [i for i, own in enumerate(wins) if own]
    families = tuple((list(measured)[i], tuple(sorted(wins[i]))) for i in needed)
    index = np.array([needed.index(i) if i in needed else -1 for i in range(len(measured))])
    return Options(True, lengths, _measured(facts), seconds, families, index[owner])


def drafter_name(facts: Mapping[str, Any], route: int) -> str:
    """The name of a route's drafter; -1 is what adapters belong on, and behind those that were measured are the others."""
    if route == router.ADAPTIVE:
        return "adaptive"
    return drafter_names(facts)[-1] if route < 0 else _all_names(facts)[route]


def routes_outside(facts: Mapping[str, Any]) -> dict[str, int]:
    """The routes of the pool's whole drafters, which its bank has not: `mixed`, a base that is not the trunk, those added."""
    names = _all_names(facts)
    own = [*drafter_names(facts)[len(facts["tasks"]) : -1], *facts["added"]]
    return {name: names.index(name) for name in own}


@lru_cache(maxsize=4)
def companion(pool: Pool, name: str) -> Pool:
    """The pool behind a family, which shares the target's weights; UserError if it is another than was calibrated with."""
    said = pool.facts["further"][name]
    again = (
        f"remove {pool.path} and run `python -m train.calibrate` again with the place of {name} in --calibrate.further"
    )
    try:
        found = beside(said["pool"], pool, said["draft"])
    except UserError as error:
        raise UserError(f"{name}, which {pool.path} was calibrated with, cannot be read ({error}); {again}") from error
    if found.digest != said["digest"]:
        raise UserError(f"{said['pool']} has changed since {pool.path} was calibrated with it; {again}")
    return found


@lru_cache(maxsize=4)
def parameters(pool: Pool, name: str) -> Any:
    """Those of a family of `WITHOUT_WEIGHTS`: the pool's table; UserError if it is another than was calibrated with."""
    if name != TABLES:
        return ()
    if said := another_table(pool):
        raise UserError(said)
    return pool.trigrams


def another_table(pool: Pool) -> str:
    """A sentence where the pool's table is not the one that it was calibrated with, else none."""
    known = pool.facts["further"].get(TABLES)
    if known is None or digest_of_parameters(pool.path, TABLES) == known["digest"]:
        return ""
    families = " ".join(_said_again(pool.facts))
    return (
        f"{pool.path / TRIGRAMS} is not the table that the pool was calibrated with; run `python -m train.calibrate --pool "
        f"{pool.path} --calibrate.further {families}` with another --out"
    )


def digest_of_parameters(folder: Path, name: str) -> str:
    """Identity of what `parameters` gives of a pool; none of nothing, and of a table that was never counted."""
    return digest_of_file(folder / TRIGRAMS) if name == TABLES else ""


def lengths_of(name: str, asked: Iterable[int]) -> tuple[int, ...]:
    """The draft lengths at which a further family is measured: those asked for, and of tables MAX_DRAFT nodes as well."""
    return tuple(sorted({k for k in asked if k} | ({MAX_DRAFT} if name == TABLES else set())))


def spoken(drafter: str, length: int) -> str:
    """A draft length as people read it."""
    return f"{length} nodes" if drafter == TABLES else f"K = {length}"


def beside(path: str, pool: Pool, draft: str = "") -> Pool:
    """Another pool of the pool's target, or a drafter of it in a folder; UserError as of `load_beside` and `lone_drafter`."""
    alone = not (draft or Path(path, MANIFEST).exists())
    return lone_drafter(path, pool) if alone else load_beside(path, pool, draft)


def _said_again(facts: Mapping[str, Any]) -> list[str]:
    """The words by which --calibrate.further asks for what the pool chooses among beside its own."""
    of = lambda own: ",".join(filter(None, (own["pool"], own["draft"])))
    families = (f"{name}={of(own)}" if own["pool"] else name for name, own in facts["further"].items())
    return [*families, *(name for name, digest in facts["added"].items() if digest)]


def _all_names(facts: Mapping[str, Any]) -> tuple[str, ...]:
    return (*_measured(facts), *(name for name, digest in facts["added"].items() if not digest))


def _measured(facts: Mapping[str, Any]) -> tuple[str, ...]:
    other = [drafter for own in facts["further"].values() for drafter in own["acceptance_length"]]
    return (*measured_names(facts), *other)
