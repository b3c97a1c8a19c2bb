"""Pools in memory: read from a folder, read beside another whose target they share, or another with a larger target."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from jaxspec import router, sharding, shift
from jaxspec.adapters import Bank, Whole, init_bank, merge
from jaxspec.config import UserError
from jaxspec.joining import apart, joined_in_place, pays
from jaxspec.store.facts import find_pool
from jaxspec.store.huggingface import Model
from jaxspec.store.models import Pair, read_pair, with_draft
from jaxspec.store.names import BANK, MIXED, NORMAL, ROUTER, TRUNK_FILE
from jaxspec.store.pool import Pool
from jaxspec.store.stages import read_fields
from jaxspec.store.trees import read_tree, read_weights
from jaxspec.transformer import LMConfig, abstract
from jaxspec.widening import outline, widened


def load_pool(path: str, *, target: str = "", draft: str = "", dtype: str = "", mesh: Mesh | None = None) -> Pool:
    """Loads a pool.

    Args:
        target, draft: other places of the same models; their digest must agree.
        dtype: type of weights and activations, if not the one that the pool was made with.
        mesh: where all of it lives, by `jaxspec.sharding`; None for the default device.

    Raises:
        UserError: no pool there, a model that is another one, a damaged file.
    """
    places = {"target": target, "draft": draft, "dtype": dtype, "mesh": mesh}
    return known_pool(*find_pool(path), **places)


def known_pool(
    folder: Path,
    facts: dict,
    digest: str,
    *,
    target: str = "",
    draft: str = "",
    dtype: str = "",
    mesh: Mesh | None = None,
) -> Pool:
    """Loads a pool whose facts are known already."""
    paths = {"target": target or facts["target"]["path"], "draft": draft or facts["draft"]["path"]}
    pair = read_pair(paths["target"], paths["draft"], dtype or facts["dtype"], mesh)
    _check_model("target", pair.target, facts, "--target")
    _check_model("draft", pair.draft, facts, "--draft")
    if pair.fingerprint != facts["tokenizer"]:
        raise UserError(f"the tokenizer in {pair.target.path} is not the one that this pool was made with")
    return _with_pair(folder, facts, digest, pair._replace(target=_joined(pair.target)), mesh)


def load_beside(path: str, other: Pool, draft: str = "") -> Pool:
    """Loads a pool of the other's target, whose weights both share, and those of the base drafter where it is the same.

    Type and mesh are the other's.

    Args:
        draft: another place of the pool's base drafter; its digest must agree.

    Raises:
        UserError: a pool of another target or tokenizer, or what `load_pool` raises.
    """
    folder, facts, digest = find_pool(path)
    made_with = {"target": facts["target"]["digest"], "tokenizer": facts["tokenizer"]}
    known = {"target": other.pair.target.digest, "tokenizer": other.pair.fingerprint}
    for name, found in made_with.items():
        if found != known[name]:
            raise UserError(
                f"{path} was made with another {name} than {other.path}: its digest is {found}, not {known[name]}; "
                f"only pools of one {name} can be measured together"
            )
    shared, place = not draft and facts["draft"]["digest"] == other.pair.draft.digest, draft or facts["draft"]["path"]
    if not (shared or Path(place).is_dir()):
        raise UserError(f"{place}, the base drafter of {path}, is not there; name its folder as {path},FOLDER")
    pair = other.pair if shared else with_draft(other.pair, place, other.mesh)
    _check_model("draft", pair.draft, facts, f"{path},FOLDER")
    return _with_pair(folder, facts, digest, pair, other.mesh)


def lone_drafter(path: str, other: Pool) -> Pool:
    """A drafter in a Hugging Face folder as a pool of no tasks, whose base it is; the target, type and mesh are the other's.

    Raises:
        UserError: no model there that is supported, or one of another tokenizer.
    """
    pair = with_draft(other.pair, path, other.mesh)
    facts = {**other.facts, "tasks": [], "mixed": "", "trunk": False, "added": {}}
    own = {"path": Path(path), "pair": pair, "facts": facts, "digest": pair.draft.digest}
    return replace(other, trunk=pair.draft.params, bank=[], mixed={}, normal=None, **own)


def widen(pool: Pool, shape: LMConfig, seed: int = 0) -> Pool:
    """The pool with a target of a larger shape and cost that says what its own says, see `widening`; all else as it was.

    Raises:
        UserError: the shape does not hold the target, or the mesh does not divide it.
    """
    target, mesh = pool.pair.target, pool.mesh
    config, where = outline(target.config, shape), None
    if mesh is not None:
        sharding.check(config, mesh)
        where = sharding.shardings(sharding.param_specs(abstract(config)), mesh)
    narrow = apart(target.config, target.params)
    _, params = widened(target.config, narrow, shape, jax.random.key(seed), where)
    return with_target(pool, _joined(replace(target, config=config, params=params)))


def with_target(pool: Pool, target: Model) -> Pool:
    """The pool with another model for its target, as it says the same."""
    return replace(pool, pair=pool.pair._replace(target=target))


def _joined(target: Model) -> Model:
    return replace(target, params=joined_in_place(target.params)) if pays(target.params) else target


def _check_model(name: str, model: Model, facts: dict, remedy: str) -> None:
    if model.digest != facts[name]["digest"]:
        raise UserError(
            f"{model.path} is not the {name} of this pool: its digest is {model.digest}, the pool was made with "
            f"{facts[name]['digest']}; give the right folder with {remedy}"
        )


def _with_pair(folder: Path, facts: dict, digest: str, pair: Pair, mesh: Mesh | None) -> Pool:
    """The pool of models that are read already."""
    whole = lambda tree: sharding.whole(tree, mesh)
    shape = router.abstract(pair.target.config.feature_width, facts["router_hidden"], len(facts["tasks"]))
    return Pool(
        folder,
        pair,
        whole(read_weights(folder / TRUNK_FILE, pair.draft.params)) if facts["trunk"] else pair.draft.params,
        whole(_bank(folder, facts, pair)),
        whole(_mixed(folder, facts, pair)),
        whole(read_tree(folder / ROUTER, shape)),
        facts,
        digest,
        mesh,
        _normal(folder / NORMAL),
    )


def _normal(file: Path) -> shift.Normal | None:
    if not file.exists():
        return None
    remedy = "remove it, and prompts that no task explains pass untold, or run `python -m train.calibrate` again"
    arrays = read_fields(file, {*shift.Normal._fields} - {"task"}, remedy)
    return shift.Normal(**{"task": np.arange(len(arrays["centres"])), **arrays})  # earlier pools have one centre a task


def _bank(folder: Path, facts: dict, pair: Pair) -> Bank:
    tasks = len(facts["tasks"])
    if facts["specialists"] == "bank_lora":
        return read_tree(folder / BANK, _adapters(facts, pair, tasks))
    of_each = lambda leaf: jax.ShapeDtypeStruct((tasks, *leaf.shape), leaf.dtype)
    return read_weights(folder / BANK, Whole(jax.tree.map(of_each, pair.draft.params)))


def _mixed(folder: Path, facts: dict, pair: Pair) -> dict:
    if facts["mixed"] == "mixed_lora":
        return merge(pair.draft.params, read_tree(folder / MIXED, _adapters(facts, pair, 1)), 0)
    return read_weights(folder / MIXED, pair.draft.params)


def _adapters(facts: dict, pair: Pair, number: int) -> Bank:
    """Shapes of so many adapters."""
    fresh = lambda: init_bank(pair.draft.params, jax.random.key(0), tasks=number, rank=facts["rank"])
    return jax.eval_shape(fresh)
