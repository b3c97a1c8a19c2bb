"""Adds a LoRA adapter in PEFT's format to a finished pool, as one more drafter under a name.

    python -m train.adopt --pool runs/testbed/pool --adapter DIR --name mine

It is merged into the model that it was trained on: the pool's base drafter, or its trunk. `decode.bench --methods mine` then
measures it like any other, and a job's line may name it. A pool that `train.calibrate --pool POOL
--calibrate.further mine` makes may choose it, one prompt at a time.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxspec.adapters import merge
from jaxspec.config import UserError, command_line
from jaxspec.store.huggingface import digest
from jaxspec.store.loading import load_pool
from jaxspec.store.names import METHODS, NAME, extra_file
from jaxspec.store.peft import base_of, read_adapter
from jaxspec.store.pool import Pool
from jaxspec.store.trees import write_tree


@dataclass(frozen=True, kw_only=True)
class Adopt:
    """Which adapter becomes which drafter."""

    pool: str
    """Folder of the pool."""
    adapter: str
    """PEFT folder: adapter_config.json and adapter_model.safetensors."""
    name: str
    """The drafter's name: small letters, digits and dashes."""
    onto: Literal["base", "trunk"] = "base"
    """The model that the adapter was trained on; what `decode.export` writes of a pool with a trunk belongs on that."""
    target: str = ""
    """Another place of the pool's target."""
    draft: str = ""
    """Another place of the pool's base drafter."""


def run(config: Adopt) -> None:
    """Writes the drafter's weights into the pool's folder."""
    if not re.fullmatch(NAME, config.name):
        raise UserError(f"--name {config.name!r} will not do; give small letters, digits and dashes")
    pool = load_pool(config.pool, target=config.target, draft=config.draft)
    file = extra_file(pool.path, config.name)
    if file.exists() or config.name in (*METHODS, *pool.names, "trunk", *pool.facts["further"], *pool.facts["labels"]):
        raise UserError(f"--name {config.name!r}: the pool or bench has that name already; give another")
    on = pool.drafter(config.onto)
    bank = read_adapter(Path(config.adapter), on)
    if config.onto == "base":
        _check_base(config, pool)
    write_tree(file, merge(on, bank, 0))
    print(f"adopt: {config.name} is in {pool.path}; measure it with `decode.bench --methods {config.name}`")


def _check_base(config: Adopt, pool: Pool) -> None:
    """Refuses an adapter that names another model, where that is a folder here."""
    named = base_of(Path(config.adapter))
    if named and Path(named).is_dir() and (found := digest(named)) != pool.pair.draft.digest:
        raise UserError(
            f"--adapter {config.adapter} belongs on {named}, whose digest is {found}; the pool's base drafter has "
            f"{pool.pair.draft.digest}: give an adapter of that, or --onto trunk for one that was exported with the trunk"
        )


if __name__ == "__main__":
    command_line(Adopt, run)
