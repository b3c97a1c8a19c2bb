"""A job's trigram table: where it begins, what finished texts teach it, and the file beside the output that keeps it.

Tables draft for all prompts of a job or for none: rounds of trees have programs of their own.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxspec.config import UserError
from jaxspec.engine import Method, unrouted
from jaxspec.router import ADAPTIVE
from jaxspec.store.names import TRIGRAMS
from jaxspec.store.pool import Pool
from jaxspec.store.prompts import Fault, Line
from jaxspec.store.stages import digest_of_file
from jaxspec.store.tables import read_table, write_table
from jaxspec.text import Ask
from jaxspec.trigrams import Growing


class Tables:
    """The table of a job that writes to `output`, as a method that drafts with what it knows by now.

    Args:
        begin: a file that an earlier job has left; empty for the pool's table.
    """

    def __init__(self, pool: Pool, output: Path, begin: str):
        self.file = _left_by(output)
        self._growing = Growing(read_table(Path(begin), pool.mesh) if begin else pool.trigrams)
        self.method = Method("adaptive", unrouted, self._growing.params)

    def saw(self, prompt: Sequence[int], answer: Sequence[int]) -> None:
        """A text has ended."""
        self._growing.saw([*prompt, *answer])

    def write(self) -> None:
        """Leaves the table beside the output."""
        write_table(self.file, self._growing.table)


def wanted(drafter: str, asks: Sequence[Ask | str]) -> bool:
    """Whether tables draft for these prompts, of which those that name none have this drafter."""
    routes = [ask.request.route for ask in asks if isinstance(ask, Ask)]
    return ADAPTIVE in routes if routes else drafter == "adaptive"


def begins_as(pool: str, begin: str) -> str | None:
    """Identity of the file that a job's table begins as; None where it begins empty."""
    return digest_of_file(Path(begin) if begin else Path(pool, TRIGRAMS)) or None


def check(
    lines: Sequence[Line | Fault],
    asks: Sequence[Ask | str],
    drafter: str,
    begin: str,
    output: Path,
    judging: Mapping[str, bool],
) -> None:
    """Raises UserError where tables would draft beside models, or nothing, or can not begin.

    Args:
        drafter: of lines that name none.
        judging: flags of a job that judges models.
    """
    if begin and not Path(begin).is_file():
        raise UserError(f"--table {begin}: no such file; give the .trigrams.npz that a job has left beside its output")
    if begin and Path(begin).resolve() == _left_by(output).resolve():
        raise UserError(f"--table {begin} is where this job leaves its own; copy it to another place and give that")
    if not wanted(drafter, asks):
        if begin:
            raise UserError("--table needs --drafter adaptive, which drafts with it; give both")
        return
    for flag in (flag for flag, given in judging.items() if given):
        raise UserError(f"--{flag} judges drafters that are models, `adaptive` is none; give one of them")
    for line, ask in zip(lines, asks, strict=True):
        if isinstance(ask, Ask) and ask.request.route != ADAPTIVE:
            said = "this line does not ask for `adaptive`, which drafts for all prompts of a job or for none"
            raise UserError(f"{line.source}: {said}; give --drafter adaptive and no drafter here, or two jobs")


def _left_by(output: Path) -> Path:
    return output.with_name(f"{output.name}.trigrams.npz")
