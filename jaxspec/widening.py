"""A model widened to a larger one's shape and cost without changing what it computes.

The old model's numbers stand inside larger kernels. Columns of the residual that it does not have stay zero through every
layer, because nothing is written to them: what writes to the residual (`o`, `down`) is zero outside the old model. All
else that is added is random, so that a larger model's bytes are read and its products made, and none of them is seen:

- a norm over H columns of which D are alive has its gain times sqrt(D / H) and its epsilon times D / H;
- a rotary pair stands where the larger head turns at its frequency, and queries make good the larger head's 1 / sqrt(d);
- the heads of an old group share new groups that hold no other group's, each with a copy of its key and value head;
- added layers write nothing; logits of added vocabulary rows are masked, as those of padded vocabularies are.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxspec.config import UserError
from jaxspec.published import PUBLISHED
from jaxspec.sharding import AXES
from jaxspec.transformer import LMConfig, abstract

SHAPES = {
    "llama-2-7b": PUBLISHED["meta-llama/Llama-2-7b-hf"],
    "llama-3.2-1b": PUBLISHED["meta-llama/Llama-3.2-1B"],
    "llama-3.1-8b": PUBLISHED["meta-llama/Llama-3.1-8B"],
}
"""What a target can be widened to."""
NUMBERS = ("width", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_width")
DEVIATION = 0.02  # of random weights, as models are initialised
ADDED, SILENT = -1, -2  # places of an axis that the old model does not have; the second in a head that it has


def shape_of(name: str) -> LMConfig:
    """One of `SHAPES` by its name; UserError for another name."""
    if name not in SHAPES:
        raise UserError(f"there is no shape {name!r}; give one of {', '.join(SHAPES)}")
    return SHAPES[name]


def outline(config: LMConfig, shape: LMConfig) -> LMConfig:
    """The widened model: a shape's sizes, and all else the model's own.

    A vocabulary that is larger than the shape's is kept.

    Raises:
        UserError: the shape is smaller in some number, or cannot hold the model's heads, norms or head.
    """
    for name in NUMBERS:
        if getattr(shape, name) < getattr(config, name):
            raise UserError(_small(name, getattr(shape, name), getattr(config, name)))
    if shape.head_dim % config.head_dim:
        raise UserError(
            f"the shape's head dim {shape.head_dim} is no multiple of the target's {config.head_dim}, whose rotary "
            "frequencies it then lacks; choose another shape"
        )
    needed = config.num_kv_heads * _parts(config, shape)
    if shape.num_kv_heads < needed:
        raise UserError(_small("num_kv_heads", shape.num_kv_heads, needed))
    if config.qk_norm:
        raise UserError(
            "a target with norms of queries and keys cannot be widened: they share their epsilon with others"
        )
    if shape.tied and not config.tied:
        raise UserError("the shape has one table for embedding and head, the target two; choose an untied shape")
    own = ("max_positions", "rope", "qkv_bias", "output_bias", "mlp_bias", "qk_norm")
    return replace(
        shape,
        **{name: getattr(config, name) for name in own},
        vocab_size=max(shape.vocab_size, config.vocab_size),
        norm_eps=config.norm_eps * config.width / shape.width,
        windows=(*config.windows, *[None] * (shape.num_layers - config.num_layers)) if config.windows else (),
        live_width=config.feature_width,
        live_vocab=config.live_vocab or config.vocab_size,
    )


def widened(
    config: LMConfig, params: dict, shape: LMConfig, key: Array, shardings: Any = None
) -> tuple[LMConfig, dict]:
    """The `outline` of a model in a shape, and parameters with which it has the model's logits and features.

    Parameters are made one by one where they will live, in the model's type; what is random is drawn from `key` alone.

    Args:
        shardings: where each parameter lives, a tree of them as of `abstract`; None: the default device.
    """
    new = outline(config, shape)
    paths, treedef = jax.tree.flatten_with_path(abstract(new))
    places = [None] * len(paths) if shardings is None else treedef.flatten_up_to(shardings)
    sources = _sources(config, new)
    nothing = {axis: np.full_like(source, ADDED) for axis, source in sources.items()}

    def make(number: int, names: Sequence[Any], place: Any) -> Array:
        added = names[0] == "layers" and names[1] >= config.num_layers
        axes = _axes(names, nothing if added else sources)
        old = _read(params, ["layers", 0, *names[2:]] if added else names)
        of = names[-2] if names[-1] != "scale" else "norm"
        return _maker(of, place)(jax.random.fold_in(key, number), old, axes, _scale(of, config, new))

    names = [[step.key for step in path] for path, _ in paths]
    return new, treedef.unflatten([make(i, *own) for i, own in enumerate(zip(names, places, strict=True))])


def _small(number: str, given: int, needed: int) -> str:
    return f"the shape's {number.replace('_', ' ')} is {given}, the target needs {needed}; choose a larger shape"


def _parts(config: LMConfig, shape: LMConfig) -> int:
    """New groups of heads that hold an old one."""
    return -(-(config.num_heads // config.num_kv_heads) // (shape.num_heads // shape.num_kv_heads))


def _sources(old: LMConfig, new: LMConfig) -> dict[str, np.ndarray]:
    """For each axis of kernels its places in the old model, by `sharding.AXES`; below 0 where it has none."""
    heads, kv_heads = _heads(old, new)
    dims = _dims(old.head_dim, new.head_dim)
    return {
        "width": _first(old.width, new.width),
        "vocab": _first(old.vocab_size, new.vocab_size),
        "mlp": _first(old.mlp_width, new.mlp_width),
        "heads": _by_head(heads, dims, old.head_dim),
        "kv_heads": _by_head(kv_heads, dims, old.head_dim),
    }


def _first(old: int, new: int) -> np.ndarray:
    places = np.arange(new)
    return np.where(places < old, places, ADDED)


def _heads(old: LMConfig, new: LMConfig) -> tuple[np.ndarray, np.ndarray]:
    """Which old heads, and old key and value heads, the new ones are."""
    parts, size = _parts(old, new), old.num_heads // old.num_kv_heads
    group, number = np.divmod(np.arange(new.num_heads), new.num_heads // new.num_kv_heads)
    kv, part = np.divmod(group, parts)
    within = part * (new.num_heads // new.num_kv_heads) + number
    heads = np.where((kv < old.num_kv_heads) & (within < size), kv * size + within, ADDED)
    copies = np.arange(new.num_kv_heads) // parts
    return heads, np.where(copies < old.num_kv_heads, copies, ADDED)


def _dims(old: int, new: int) -> np.ndarray:
    """Which dimensions of an old head a new one's are: both halves of a rotary pair where the new head turns alike."""
    pairs = np.arange(old // 2)
    dims = np.full(new, SILENT)
    dims[pairs * (new // old)] = pairs
    dims[new // 2 + pairs * (new // old)] = old // 2 + pairs
    return dims


def _by_head(heads: np.ndarray, dims: np.ndarray, head_dim: int) -> np.ndarray:
    places = np.where(dims < 0, dims, heads[:, None] * head_dim + dims)
    return np.where(heads[:, None] < 0, ADDED, places).reshape(-1)


def _axes(names: Sequence[Any], sources: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    axes = ("width",) if names[-1] == "scale" else AXES[names[-2]]
    return tuple(sources[axis] for axis in (axes[-1:] if names[-1] == "bias" else axes))


def _read(params: dict, names: Sequence[Any]) -> Any:
    if names[0] == "head" and "head" not in params:
        return params["embed"]["embedding"].T
    return reduce(lambda tree, name: tree[name], names, params)


def _scale(module: str, old: LMConfig, new: LMConfig) -> float:
    """What the old model's numbers are multiplied by."""
    return {"norm": math.sqrt(old.width / new.width), "q": math.sqrt(new.head_dim / old.head_dim)}.get(module, 1.0)


@lru_cache(maxsize=64)
def _maker(module: str, place: Any):
    """A program that serves a parameter of all layers."""
    return jax.jit(partial(_parameter, module), out_shardings=place)


def _parameter(module: str, key: Array, old: Array, axes: tuple[Array, ...], scale: Array) -> Array:
    own = reduce(lambda x, axis: jnp.take(x, jnp.maximum(axes[axis], 0), axis=axis), range(old.ndim), old)
    known = reduce(jnp.logical_and, (places >= 0 for places in jnp.ix_(*axes)))
    return jnp.where(known, (own * scale).astype(old.dtype), _rest(module, key, axes, own))


def _rest(module: str, key: Array, axes: tuple[Array, ...], like: Array) -> Array:
    """What is not of the old model."""
    if like.ndim == 1:
        return jnp.full_like(like, module == "norm")
    if module in ("o", "down"):
        return jnp.zeros_like(like)
    noise = DEVIATION * jax.random.normal(key, like.shape, like.dtype)
    # Known tokens write to no added column; of a known head's scores the added dimensions are no part.
    without = {"embed": ADDED, "q": SILENT}.get(module)
    rows, columns = axes
    return noise if without is None else jnp.where((rows >= 0)[:, None] & (columns == without), 0, noise)
