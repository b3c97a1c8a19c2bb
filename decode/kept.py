"""What a job keeps of the prompts that it served, so that the router can be refreshed without reading them again."""

from pathlib import Path

import numpy as np

from jaxspec import pooled, shift
from jaxspec.experience import moved
from jaxspec.replay import Served, bounded
from jaxspec.store.pool import Pool
from jaxspec.store.prompts import Fault, Line
from jaxspec.store.stages import read_arrays, write_arrays
from jaxspec.text import Completion


class Kept:
    """A uniform sample of at most `most` completions of a job that writes to `output`, told apart by their ids."""

    def __init__(self, pool: Pool, output: Path, most: int):
        self.file, self.most = output.with_name(f"{output.name}.replay.npz"), most
        self.tasks, self.drafters = pool.tasks, pooled.candidates(pool)
        self.rows: dict[str, Served] = {}

    def see(self, line: Line | Fault, completion: Completion) -> None:
        """Looks at one prompt."""
        if self.most and completion.task is not None and completion.log_weights is not None:
            self.rows[line.id] = self._row(line.id, completion)
            if len(self.rows) > 2 * self.most:
                self.rows = {name: self.rows[name] for name in shift.kept(self.rows, self.most)}

    def write(self) -> None:
        """Adds what was seen to the file beside the output, which stays bounded."""
        if not self.rows:
            return
        before = [Served(**read_arrays(self.file))] if self.file.exists() else []
        write_arrays(self.file, bounded([*before, *self.rows.values()], self.most)._asdict())

    def _row(self, name: str, own: Completion) -> Served:
        one = lambda value: np.array([value])
        weights, begun = np.array([own.log_weights]), one(self.drafters.index(own.drafter))
        counts = one(own.num_accepted_tokens), one(own.num_draft_tokens)
        task = one(self.tasks.index(own.task or ""))
        return Served(one(name), own.features[None], task, moved(weights, begun), *counts)
