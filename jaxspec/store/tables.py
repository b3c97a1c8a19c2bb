"""Trigram tables on disk: an array a field."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxspec import sharding
from jaxspec.store.stages import read_fields, write_arrays
from jaxspec.trigrams import Trigrams


def read_table(file: Path, mesh: Mesh | None = None) -> Trigrams:
    """A trigram table on the mesh; UserError for a file that holds none."""
    remedy = "remove it, which leaves an empty table, or run `python -m train.extras` again"
    arrays = read_fields(file, Trigrams._fields, remedy)
    return sharding.whole(Trigrams(**jax.tree.map(jnp.asarray, arrays)), mesh)


def write_table(file: Path, table: Trigrams) -> None:
    """Writes a table; whole or not at all."""
    write_arrays(file, jax.tree.map(np.asarray, table)._asdict())
