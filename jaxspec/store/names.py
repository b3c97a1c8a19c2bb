"""Names: of a pool's files, of the drafters in it, and of what can be measured of any pool."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxspec.store.stages import digest_of_file

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


def drafter_names(facts: Mapping[str, Any]) -> list[str]:
    """A name for every route: the tasks', the control's if there is one, the base's, and the trunk's if it is not the base."""
    return [*facts["tasks"], *(["mixed"] if facts["mixed"] else []), "base", *(["trunk"] if facts["trunk"] else [])]


def measured_names(facts: Mapping[str, Any]) -> list[str]:
    """The drafters of the pool's shape that were measured: every route's, and behind them those that had been added."""
    return [*drafter_names(facts), *(name for name, digest in facts["added"].items() if digest)]


def extra_file(folder: Path, name: str) -> Path:
    """Where a pool's folder keeps a drafter that was added to it."""
    return folder / f"{name}.safetensors"


def added_to(folder: Path) -> list[str]:
    """Names of the drafters that were added to the pool in a folder."""
    own = {BANK, MIXED, TRUNK_FILE, ROUTER}
    return sorted(file.stem for file in folder.glob("*.safetensors") if file.name not in own)


def digest_of_added(folder: Path, name: str) -> str:
    """Identity of a drafter that was added; none of one that is gone."""
    return digest_of_file(extra_file(folder, name))
