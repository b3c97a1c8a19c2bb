"""What a job learns of the texts that it has finished: who should begin others, whom to rely on, what follows two tokens.

It changes drafts, and no text but those that p/q rejection samples. A job that goes on learns from its records first, which
say what the texts said: one prompt at a time it then ends as an undisturbed one.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from decode import asked, tables
from decode.job import Generate
from decode.records import written
from jaxspec import pooled, serving
from jaxspec.engine import Method
from jaxspec.experience import Experience
from jaxspec.reliability import Reliability
from jaxspec.requests import Request
from jaxspec.store.pool import Pool
from jaxspec.store.prompts import Fault, Line
from jaxspec.text import Ask


class Learnt(NamedTuple):
    """What is learnt with a pool whose rounds draft `length` tokens, of prompts `asks`.

    whole: the routes of drafters that lines name and the rows' bank has not, which nothing is learnt of.
    experience: who should begin others; None where nothing is remembered.
    trust: which specialists can be relied on; None where all are.
    tables: what drafts in place of models; None where models do.
    """

    pool: Pool
    length: int
    asks: Sequence[Ask | str]
    whole: Sequence[int]
    experience: Experience | None
    trust: Reliability | None
    tables: tables.Tables | None

    def saw(self, i: int, said: Mapping[str, Any]) -> None:
        """Learns of the text of prompt `i`, by its completion or by its record, which say the same."""
        ask = self.asks[i]
        if not isinstance(ask, Ask):
            return
        if self.experience and said.get("task") and said.get("log_weights"):
            task, began = self.pool.tasks.index(said["task"]), pooled.candidates(self.pool).index(said["drafter"])
            self.experience.saw(task, said["route_confidence"], began, said["log_weights"])
        if self.tables:
            self.tables.saw(ask.request.ids, said["token_ids"])
        if self.trust and said.get("task") and self._as_calibrated(ask.request):
            route, task = self.pool.names.index(said["drafter"]), self.pool.tasks.index(said["task"])
            self.trust.saw(route, task, said["num_drafts"], len(said["token_ids"]))

    def over(self, method: Method) -> Method:
        """The method with what was learnt of its drafters."""
        own = self.trust or self.experience
        return own.over(method) if own else method

    def tell(self) -> None:
        """Says which specialists were left out."""
        if self.trust and (failed := [self.pool.names[route] for route in self.trust.left_out()]):
            said = f"{', '.join(failed)} had less accepted than {self.pool.names[-1]} would; left out"
            print(f"generate: {said}", file=sys.stderr)

    def write(self) -> None:
        """Leaves the tables beside the output."""
        if self.tables:
            self.tables.write()

    def _as_calibrated(self, request: Request) -> bool:
        """Whether rounds of such requests say what calibration's do: greedy ones of full length, by drafters of the bank."""
        return request.temperature == 0 and request.draft_limit >= self.length and request.route not in self.whole


def begun(
    config: Generate, pool: Pool, output: Path, lines: Sequence[Line | Fault], asks: Sequence[Ask | str], length: int
) -> Learnt:
    """What the records that are written already have taught, of these lines and their requests."""
    experience = serving.inexperienced(pool) if config.remember else None
    trust = Reliability(pool.facts, length) if config.reliability else None
    own = tables.Tables(pool, output, config.table) if tables.wanted(config.drafter, asks) else None
    learnt = Learnt(pool, length, asks, asked.outside(pool.facts, asks), experience, trust, own)
    for i, record in written(output, lines) if experience or trust or own else ():
        learnt.saw(i, record)
    return learnt
