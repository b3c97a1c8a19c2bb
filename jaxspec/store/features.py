"""Drafters of features in a pool: a stage a variant under the pool's folder, made by `train.feature`."""

from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import jax

from jaxspec.config import UserError, plain
from jaxspec.drafters.feature import FeatureWeights, init_weights
from jaxspec.store.huggingface import Model
from jaxspec.store.names import FEATURE
from jaxspec.store.pool import Pool
from jaxspec.store.stages import MANIFEST, Stage, finish, read_json
from jaxspec.store.trees import read_tree, write_tree
from jaxspec.transformer import LMConfig, Rope

FILE = "weights.safetensors"


class Learnt(NamedTuple):
    """A trained drafter of features: the shape of its layer, and its weights, float32."""

    config: LMConfig
    weights: FeatureWeights


def folder_of(pool: Pool) -> Path:
    """Where a pool keeps its drafters of features."""
    return pool.path / FEATURE


def write_learnt(stage: Stage, variant: str, own: Learnt, measured: dict) -> None:
    """Completes a variant's stage; `measured` holds its `mean_acceptance_length`."""
    write_tree(stage.folder / FILE, own.weights)
    finish(stage, variant=variant, layer=plain(own.config), **measured)


def measured_of(pool: Pool) -> dict[str, dict]:
    """What is known of every trained variant."""
    manifests = sorted(folder_of(pool).glob(f"*/{MANIFEST}"))
    return {file.parent.name: read_json(file)["results"] for file in manifests}


def best_name(pool: Pool) -> str:
    """The variant with the longest accepted drafts on the calibrate split; UserError where none is trained."""
    found = measured_of(pool)
    if not found:
        raise UserError(
            f"{pool.path} has no drafter of features; `python -m train.feature --pool {pool.path}` trains one"
        )
    return max(found, key=lambda own: found[own]["mean_acceptance_length"])


@lru_cache(maxsize=4)
def best(pool: Pool) -> Learnt:
    """That variant."""
    name = best_name(pool)
    config = _shape(measured_of(pool)[name]["layer"])
    return Learnt(config, read_tree(folder_of(pool) / name / FILE, abstract(config, name, pool.pair.target)))


def abstract(config: LMConfig, variant: str, target: Model) -> FeatureWeights:
    """Shapes of a variant's weights."""
    return jax.eval_shape(partial(init_weights, config, variant), target.params, jax.random.key(0))


def _shape(said: dict) -> LMConfig:
    return LMConfig(**{**said, "rope": Rope(**said["rope"]), "windows": tuple(said["windows"])})
