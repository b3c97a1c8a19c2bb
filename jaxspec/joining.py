"""Products that read one input as one: q, k and v of a layer are a kernel together, and so are gate and up.

A GPU reads few large kernels faster than many small ones: 4096 x 4096 at .83 of the memory's speed, 4096 x 22016 at all of it.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxspec.transformer import LMConfig, parts

NAMES = {"qkv": "attention", "gate_up": "mlp"}


def join(params: dict) -> dict:
    """The same model with joined kernels; those that are joined already are kept. Not for adapters, which belong to each."""
    return params | {"layers": {number: _joined(layer) for number, layer in params["layers"].items()}}


def joined_in_place(params: dict) -> dict:
    """`join` with the memory of one layer more, not of all: what is joined is no longer in `params`."""
    layers = params["layers"]
    for number, layer in layers.items():
        new = jax.block_until_ready(_joined(layer))
        kept = set(map(id, jax.tree.leaves(new)))
        for leaf in jax.tree.leaves(layer):
            if id(leaf) not in kept:
                leaf.delete()
        layers[number] = new
    return params


def apart(config: LMConfig, params: dict) -> dict:
    """The model with a kernel of every product's own again."""
    of = {name: parts(config)[name] for name in NAMES}
    layers = {number: _apart(layer, of) for number, layer in params["layers"].items()}
    return params | {"layers": layers}


def pays(params: dict) -> bool:
    """Whether these weights live on one accelerator; parts of a joined kernel would not be parts of its products."""
    return jax.default_backend() != "cpu" and len(jax.tree.leaves(params)[0].devices()) == 1


def _joined(layer: dict) -> dict:
    return layer | {
        "attention": _one(layer["attention"], "qkv", ("q", "k", "v")),
        "mlp": _one(layer["mlp"], "gate_up", ("gate", "up")),
    }


def _one(module: dict, name: str, own: tuple[str, ...]) -> dict:
    if name in module:
        return module
    whole = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=-1), *[module[part] for part in own])
    return {part: leaf for part, leaf in module.items() if part not in own} | {name: whole}


def _apart(layer: dict, of: dict[str, dict[str, int]]) -> dict:
    out: dict[str, Any] = dict(layer)
    for name, where in NAMES.items():
        module = dict(layer[where])
        whole, start = module.pop(name, None), 0
        for part, width in of[name].items() if whole is not None else ():
            cut = slice(start, start + width)
            module[part] = jax.tree.map(lambda leaf, cut=cut: leaf[..., cut], whole)
            start += width
        out[where] = module
    return out
