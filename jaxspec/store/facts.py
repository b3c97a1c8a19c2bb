"""What a pool's manifest says, read without any weights: its facts, and what follows from those that calibration measured.

Acceptance is known by drafter, task and draft length, and what a round takes by length and slots. Together they say which
drafters serve a task, how many tokens to draft, and how fast that is.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxspec import router
from jaxspec.config import UserError
from jaxspec.requests import MAX_DRAFT, checked
from jaxspec.store.names import added_to, drafter_names
from jaxspec.store.stages import MANIFEST, read_json


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
