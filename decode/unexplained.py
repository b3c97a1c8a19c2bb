"""What a job tells of prompts that no task of its pool explains, and keeps of them for the next training."""

import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from jaxspec import router, shift
from jaxspec.store.pool import Pool
from jaxspec.store.prompts import Fault, Line, read_prompts
from jaxspec.store.stages import write_whole
from jaxspec.text import Completion


class Watch:
    """Sees the completions of a job that writes to `output`; a pool that does not say what is normal lets all pass."""

    def __init__(self, pool: Pool, output: Path):
        self.known, self.tasks = pool.normal, pool.tasks
        self.router = jax.tree.map(np.asarray, pool.router)  # on the host, where completions are
        self.file = output.with_name(f"{output.name}.unexplained.jsonl")
        self.prompts, self.strange = 0, list[Line]()

    def see(self, line: Line | Fault, completion: Completion) -> None:
        """Looks at one prompt."""
        if self.known is None or isinstance(line, Fault) or completion.task is None:
            return
        features = router.standardised(self.router, completion.features[None])
        task, confidence = np.array([self.tasks.index(completion.task)]), np.array([completion.route_confidence])
        self.prompts += 1
        if shift.strange(self.known, features, task, confidence)[0]:
            self.strange.append(line)

    def report(self) -> str | None:
        """One line when more prompts than expected resemble no task; then a sample of them lies beside the output."""
        number = len(self.strange)
        if not shift.unexplained(number, self.prompts):
            return None
        _keep(self.file, self.strange)
        examples = ", ".join(line.id for line in self.strange[:3])
        share = f"{number} of {self.prompts} prompts of this run ({100 * number / self.prompts:.1f} %)"
        return (
            f"{share} resemble no task of this pool, for example {examples}; add {self.file} to its log and train again"
        )


def _keep(file: Path, lines: Sequence[Line]) -> None:
    """Adds lines to a file of prompts that stays bounded."""
    before = read_prompts(str(file)) if file.exists() else []
    by_id = {line.id: line for line in [*before, *lines]}
    rows = [{"id": name, "messages": by_id[name].messages} for name in shift.kept(by_id)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_whole(file, lambda part: part.write_text(text, encoding="utf-8"))
