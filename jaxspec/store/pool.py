"""The pool: all that decoding needs. Target and base by path and digest, the adapter bank, mixed, router, calibration."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxspec import router, sharding, shift, trigrams
from jaxspec.adapters import Bank, Whole, init_bank, merge
from jaxspec.config import UserError
from jaxspec.joining import apart, joined_in_place, pays
from jaxspec.requests import MAX_DRAFT, checked
from jaxspec.router import TRUNK, RouterParams
from jaxspec.store.huggingface import Model
from jaxspec.store.models import Pair, read_pair, with_draft
from jaxspec.store.stages import MANIFEST, digest_of_file, read_arrays, read_json
from jaxspec.store.trees import read_tree
from jaxspec.transformer import LMConfig, abstract
from jaxspec.widening import outline, widened

BANK, MIXED, TRUNK_FILE, ROUTER, TEST, POINTS, NORMAL, REPLAY, EXTRAS, TRIGRAMS = (
    "bank.safetensors",
    "mixed.safetensors",
    "trunk.safetensors",
    "router.safetensors",
    "test.jsonl",
    "points.npz",
    "normal.npz",
    "replay.npz",
    "extras.json",
    "trigrams.npz",
)


MERGED = ("merged-average", "merged-awd", "merged-doge")
ONLINE = ("online", "online-wrong")
FEATURE = "feature"
METHODS = (
    "autoregressive",
    "base",
    "mixed",
    "routed",
    "chosen",
    "random",
    "wrong",
    "oracle",
    "ngram",
    "adaptive",
    "multi-draft",
    "tree",
    "graph",
    "merged-trees",
    "merged-trees-two-best",
    FEATURE,
    "card",
    *ONLINE,
    *MERGED,
)
"""What `decode.bench` can measure of any pool; no drafter that is added may have such a name."""
NAME = "[a-z0-9][a-z0-9-]*"
"""How a drafter or a pool may be named on the command line."""


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
        return _whole(_like(read_tree(file, self.pair.draft.params), self.pair.draft.params), self.mesh)

    @property
    def trigrams(self) -> trigrams.Trigrams:
        """The table that `train.extras` has counted, or else one that knows nothing yet."""
        file = self.path / TRIGRAMS
        return read_table(file, self.mesh) if file.exists() else _whole(trigrams.empty(), self.mesh)


def extra_file(folder: Path, name: str) -> Path:
    """Where a pool's folder keeps a drafter that was added to it."""
    return folder / f"{name}.safetensors"


def read_table(file: Path, mesh: Mesh | None = None) -> trigrams.Trigrams:
    """A trigram table on the mesh; UserError for a file that holds none."""
    arrays = read_arrays(file)
    missing = {*trigrams.Trigrams._fields} - {*arrays}
    if missing:
        raise UserError(
            f"{file} is damaged (it lacks {', '.join(sorted(missing))}); remove it, which leaves an empty table, or run "
            "`python -m train.extras` again"
        )
    return _whole(trigrams.Trigrams(**jax.tree.map(jnp.asarray, arrays)), mesh)


def added_to(folder: Path) -> list[str]:
    """Names of the drafters that were added to the pool in a folder."""
    own = {BANK, MIXED, TRUNK_FILE, ROUTER}
    return sorted(file.stem for file in folder.glob("*.safetensors") if file.name not in own)


def digest_of_added(folder: Path, name: str) -> str:
    """Identity of a drafter that was added; none of one that is gone."""
    return digest_of_file(extra_file(folder, name))


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


def find_pool(path: str) -> tuple[Path, dict, str]:
    """A pool's folder, what its manifest says, and its digest; no weights are read.

    `added` has the drafters that were added to the pool, by the digest that they were measured with, empty for the others.
    """
    folder = Path(path)
    if not (folder / MANIFEST).exists():
        raise UserError(f"{path!r} is not a pool (it has no {MANIFEST}); `python -m train` makes one in OUT/pool")
    manifest = read_json(folder / MANIFEST)
    if manifest.get("stage") != "pool":
        raise UserError(f"{path!r} holds the stage {manifest.get('stage')!r}, not a pool; give OUT/pool")
    if "acceptance_length" not in manifest["results"]:
        raise UserError(f"{path!r} was made by an earlier version; remove it and run `python -m train.calibrate` again")
    earlier = {"trunk": False, "specialists": "bank_lora", "training": None, "curves": None, "further": {}}
    device = manifest["device"] if "calibrate" in manifest["config"] else None
    earlier |= {"trained": None, "calibrated": {"device": device, "temperature": 0.0}}
    added = {name: own for name, own in manifest["results"].get("added", {}).items() if own}
    added |= {name: "" for name in added_to(folder) if name not in added}
    return folder, _by_slots({**earlier, **manifest["results"], "added": added}), manifest["digest"]


def _by_slots(facts: dict) -> dict:
    """The facts with the pool's own rounds in one place; earlier versions said those of the fewest slots twice, or alone."""
    alone = facts.pop("calibration", None)
    return {**facts, "calibration_by_slots": facts.get("calibration_by_slots") or {"1": alone}}


def calibration(measured: Mapping[str, Any], slots: int | None = None) -> dict[int, dict[str, Any]]:
    """What was measured of each draft length, in the fewest slots of those measured, or as a job of `slots` wants it.

    A further family is measured in the fewest slots alone, and its `calibration` says so. What a job wants is the fewest
    measured slots that are no fewer than its own, else the most: the more rows a call has, the less it gains by more
    columns, so that what pays there pays here, and a job drafts nothing where it may lose.
    """
    tables = measured["calibration_by_slots"] if "calibration_by_slots" in measured else {1: measured["calibration"]}
    by_slots = {int(own): table for own, table in tables.items()}
    near = min((own for own in by_slots if own >= (slots or 0)), default=max(by_slots))
    return {int(k): row for k, row in by_slots[near].items()}


def draft_length(facts: Mapping[str, Any], asked: int | None = None, least: int = 0, slots: int | None = None) -> int:
    """Tokens to draft a round: as asked, or else the number, from `least` on, that calibration found fastest.

    Args:
        slots: rows that are decoded together, see `calibration`.

    Raises:
        UserError: the number asked for is not between `least` and MAX_DRAFT.
    """
    if asked is None:
        table = {k: row for k, row in calibration(facts, slots).items() if k >= least}
        return max(table, key=lambda k: table[k]["tokens_per_second"])
    if checked("num_speculative_tokens", asked) < least:
        raise UserError(f"num_speculative_tokens {asked} must lie between {least} and {MAX_DRAFT}")
    return asked


def drafter_names(facts: Mapping[str, Any]) -> list[str]:
    """A name for every route: the tasks', the control's if there is one, the base's, and the trunk's if it is not the base."""
    return [*facts["tasks"], *(["mixed"] if facts["mixed"] else []), "base", *(["trunk"] if facts["trunk"] else [])]


def measured_names(facts: Mapping[str, Any]) -> list[str]:
    """The drafters of the pool's shape that were measured: every route's, and behind them those that had been added."""
    return [*drafter_names(facts), *(name for name, digest in facts["added"].items() if digest)]


def served_by_trunk(facts: dict) -> list[bool]:
    """For each task whether its adapter gains nothing at the draft length, not 0, that was the fastest."""
    k, lengths, trunk = draft_length(facts, least=1), facts["acceptance_length"], drafter_names(facts)[-1]
    pairs = ((lengths[name][task], lengths[trunk][task]) for task, name in enumerate(facts["tasks"]))
    return [own is not None and own[k] <= without[k] for own, without in pairs]


def tokens_a_round(measured: Mapping[str, Any], names: Sequence[str], lengths: Sequence[int]) -> np.ndarray:
    """Tokens a round `[D, T, K]` of drafters on every task with so many tokens drafted.

    A task without prompts in the calibrate split counts as the mean of the others.

    Args:
        measured: `acceptance_length` by drafter, task and length.
    """
    of_task = lambda own: [np.nan] * len(lengths) if own is None else [own[k] for k in lengths]
    accepted = np.array([[of_task(own) for own in measured["acceptance_length"][name]] for name in names])
    return np.where(np.isnan(accepted), np.nanmean(accepted, axis=1, keepdims=True), accepted)


def expected_seconds(measured: Mapping[str, Any], names: Sequence[str], lengths: Sequence[int]) -> np.ndarray:
    """Expected seconds a token `[D, T, K]`, infinite at lengths that were not measured; see `calibration`."""
    rounds = {k: row["round_milliseconds"] / 1e3 for k, row in calibration(measured).items()}
    of_length = np.array([rounds.get(k, np.inf) for k in lengths])
    return router.token_seconds(tokens_a_round(measured, names, lengths), of_length)


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
    whole = lambda tree: _whole(tree, mesh)
    shape = router.abstract(pair.target.config.feature_width, facts["router_hidden"], len(facts["tasks"]))
    return Pool(
        folder,
        pair,
        whole(_full(folder / TRUNK_FILE, pair)) if facts["trunk"] else pair.draft.params,
        whole(_bank(folder, facts, pair)),
        whole(_mixed(folder, facts, pair)),
        whole(read_tree(folder / ROUTER, shape)),
        facts,
        digest,
        mesh,
        _normal(folder / NORMAL),
    )


def _whole(tree: Any, mesh: Mesh | None) -> Any:
    """The tree on every device of the mesh."""
    return tree if mesh is None else sharding.place(tree, sharding.param_specs(tree, "drafter"), mesh)


def _normal(file: Path) -> shift.Normal | None:
    if not file.exists():
        return None
    arrays = read_arrays(file)
    missing = {*shift.Normal._fields} - {"task", *arrays}
    if missing:
        raise UserError(
            f"{file} is damaged (it lacks {', '.join(sorted(missing))}); remove it, and prompts that no task explains pass "
            "untold, or run `python -m train.calibrate` again"
        )
    return shift.Normal(**{"task": np.arange(len(arrays["centres"])), **arrays})  # earlier pools have one centre a task


def _bank(folder: Path, facts: dict, pair: Pair) -> Bank:
    tasks = len(facts["tasks"])
    if facts["specialists"] == "bank_lora":
        return read_tree(folder / BANK, _adapters(facts, pair, tasks))
    of_each = lambda leaf: jax.ShapeDtypeStruct((tasks, *leaf.shape), leaf.dtype)
    return _like(read_tree(folder / BANK, Whole(jax.tree.map(of_each, pair.draft.params))), Whole(pair.draft.params))


def _mixed(folder: Path, facts: dict, pair: Pair) -> dict:
    if facts["mixed"] == "mixed_lora":
        return merge(pair.draft.params, read_tree(folder / MIXED, _adapters(facts, pair, 1)), 0)
    return _full(folder / MIXED, pair)


def _adapters(facts: dict, pair: Pair, number: int) -> Bank:
    """Shapes of so many adapters."""
    fresh = lambda: init_bank(pair.draft.params, jax.random.key(0), tasks=number, rank=facts["rank"])
    return jax.eval_shape(fresh)


def _full(file: Path, pair: Pair) -> dict:
    """Weights of a full fine-tune."""
    return _like(read_tree(file, abstract(pair.draft.config, jnp.float32)), pair.draft.params)


def _like(weights: Any, params: Any) -> Any:
    return jax.tree.map(lambda new, leaf: new.astype(leaf.dtype), weights, params)
