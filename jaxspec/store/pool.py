"""The pool: all that decoding needs. Target and base by path and digest, the adapter bank, mixed, router, calibration."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxspec import sharding, shift, trigrams
from jaxspec.adapters import Bank, merge
from jaxspec.config import UserError
from jaxspec.router import TRUNK, RouterParams
from jaxspec.store.facts import served_by_trunk
from jaxspec.store.models import Pair
from jaxspec.store.names import TRIGRAMS, added_to, digest_of_added, drafter_names, extra_file, measured_names
from jaxspec.store.tables import read_table
from jaxspec.store.trees import read_weights


@dataclass(frozen=True, eq=False)
class Pool:
    """Models and drafters in memory.

    trunk: weights that adapters belong on, the base drafter's own unless it was trained on the union first; bank: adapters or
    whole weights, one a task; mixed: weights of the control; facts: what the manifest says of tasks, labels, calibration and
    the log; mesh: where all of it lives, None for the default device; normal: what prompts of its tasks look like, None for a
    pool that does not say.
    """

    path: Path
    pair: Pair
    trunk: dict
    bank: Bank
    mixed: dict
    router: RouterParams
    facts: dict[str, Any]
    digest: str
    mesh: Mesh | None = None
    normal: shift.Normal | None = None

    @property
    def tasks(self) -> list[str]:
        return self.facts["tasks"]

    @property
    def drafters(self) -> list[int]:
        """The route that serves each task: its own, or TRUNK where that accepts no less."""
        return [TRUNK if trunk else task for task, trunk in enumerate(served_by_trunk(self.facts))]

    @property
    def names(self) -> list[str]:
        """The drafters' names; a route is an index of them, and -1 is what adapters belong on."""
        return drafter_names(self.facts)

    @property
    def added(self) -> list[str]:
        """Names of the drafters that `train.extras` and `train.adopt` have added."""
        return added_to(self.path)

    def weights(self, route: int) -> dict:
        """Weights of a route's drafter, merged; UserError for one that was added and is another than was measured."""
        name = self.names[route] if route < len(self.names) else measured_names(self.facts)[route]
        if name in self.facts["added"] and digest_of_added(self.path, name) != self.facts["added"][name]:
            raise UserError(
                f"{extra_file(self.path, name)} has changed since the pool was calibrated with it; run "
                f"`python -m train.calibrate --pool {self.path} --calibrate.further {name}` with another --out"
            )
        return self.drafter(name)

    def drafter(self, name: str) -> dict:
        """Weights of a drafter by its name: a route's, or one that `train.extras` has added."""
        if name in self.tasks:
            return merge(self.trunk, self.bank, self.tasks.index(name))
        known = {"mixed": self.mixed, "trunk": self.trunk, "base": self.pair.draft.params}
        if name in known:
            return known[name]
        file = extra_file(self.path, name)
        if not file.exists():
            raise UserError(
                f"{self.path} has no drafter {name!r}; `python -m train.extras` with the pool's flags makes it"
            )
        return sharding.whole(read_weights(file, self.pair.draft.params), self.mesh)

    @property
    def trigrams(self) -> trigrams.Trigrams:
        """The table that `train.extras` has counted, or else one that knows nothing yet."""
        file = self.path / TRIGRAMS
        return read_table(file, self.mesh) if file.exists() else sharding.whole(trigrams.empty(), self.mesh)
