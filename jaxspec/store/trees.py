"""Trees of arrays: safetensors for what is finished, Orbax for what is under way."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jaxspec.config import UserError
from jaxspec.store.stages import write_whole


def write_tree(file: Path, tree: Any) -> None:
    """Writes a tree's leaves under their dotted paths; whole or not at all."""
    leaves = {name: np.asarray(leaf) for name, leaf in _named(tree)}
    write_whole(file, lambda part: _save(leaves, part))


def read_tree(file: Path, like: Any) -> Any:
    """Reads a tree of the structure and shapes of `like`; UserError when the file is missing or damaged."""
    try:
        leaves = load_file(str(file))
    except FileNotFoundError as error:
        raise UserError(f"{file} is not there; run the stage that writes it again") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged ({error}); run the stage that writes it again") from error
    values = []
    for name, leaf in _named(like):
        if name not in leaves or leaves[name].shape != leaf.shape:
            raise UserError(f"{file}: {name} of shape {leaf.shape} is missing; the file belongs to another experiment")
        values.append(jnp.asarray(leaves[name]))
    return jax.tree.unflatten(jax.tree.structure(like), values)


def read_weights(file: Path, like: Any) -> Any:
    """Reads a tree of the structure, shapes and types of `like`; UserError as of `read_tree`."""
    return jax.tree.map(lambda new, leaf: new.astype(leaf.dtype), read_tree(file, like), like)


class Checkpoints:
    """The last checkpoint of a training run, so that a killed one goes on; a tree of arrays a step, by Orbax."""

    def __init__(self, folder: Path):
        options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, step: int, tree: Any) -> None:
        """Keeps `tree` as the state after `step` steps."""
        self._manager.save(step, args=ocp.args.StandardSave(tree))

    def latest(self, like: Any) -> tuple[int, Any]:
        """Steps done and their tree, or 0 and `like`."""
        step = self._manager.latest_step()
        if step is None:
            return 0, like
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        return step, self._manager.restore(step, args=ocp.args.StandardRestore(shapes))

    def close(self) -> None:
        """Ends the manager's threads."""
        self._manager.close()


def _save(leaves: dict[str, np.ndarray], file: Path) -> None:
    try:
        save_file(leaves, str(file))
    except SafetensorError as error:  # in which safetensors wraps a full disk or a folder without permission
        raise OSError(str(error)) from error


def _named(tree: Any):
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield ".".join(str(getattr(p, "key", getattr(p, "idx", getattr(p, "name", p)))) for p in path), leaf
