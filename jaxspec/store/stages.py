"""Stages on disk: a folder with a `manifest.json`, written last and by rename; without one a folder does not exist.

A stage that is complete and unchanged is skipped, a killed one resumes in its folder, and nothing is overwritten: the
claim written first says which experiment a folder belongs to.
"""

import hashlib
import json
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxspec.config import UserError

MANIFEST, CLAIM = "manifest.json", "claim.json"


class Stage(NamedTuple):
    """A stage's folder, whether it is complete, and what its manifest will say."""

    folder: Path
    complete: bool
    claim: dict
    started: float


def digest_of(value: Any) -> str:
    """Twelve digits that identify a plain value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def digest_of_file(file: Path) -> str:
    """Sixteen digits that identify a file's bytes; none where there is no file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.exists() else ""


def open_stage(out: str, name: str, *, config: dict, parents: dict[str, str]) -> Stage:
    """Claims `out/name` for one experiment, or finds it complete or to be resumed.

    Raises:
        UserError: the folder belongs to another experiment; the sentence says which setting differs.
    """
    if not out:
        raise UserError("--out is missing; give the folder for the stages, for example --out runs/mine")
    folder = Path(out, name)
    claim = {"stage": name, "config": json.loads(json.dumps(config)), "parents": parents}
    begun = folder.is_dir() and any(file.name != CLAIM for file in folder.iterdir())
    for file in (folder / MANIFEST, folder / CLAIM):
        if begun and file.exists():  # a claim alone holds no work
            _check_same(read_json(file), claim, folder)
            return Stage(folder, file.name == MANIFEST, claim, time.time())
    if is_writer():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / CLAIM, claim)
    return Stage(folder, False, claim, time.time())


def finish(stage: Stage, **results: Any) -> str:
    """Writes the manifest, which makes the stage exist; returns its digest."""
    manifest = {
        **stage.claim,
        "digest": digest_of(stage.claim),
        "versions": {name: _version(name) for name in ("jaxspec-decoding", "jax", "flax", "optax", "numpy")},
        "device": device_in_use(),
        "seconds": round(time.time() - stage.started, 1),
        "results": results,
    }
    if is_writer():
        write_json(stage.folder / MANIFEST, manifest)
    return manifest["digest"]


def device_in_use() -> dict[str, Any]:
    """What manifests say of the device."""
    device = jax.devices()[0]
    return {"platform": device.platform, "kind": device.device_kind, "number": jax.device_count()}


MAKERS = {"pool": "calibrate"}  # stages whose folder has another name than their command


def manifest(out: str, name: str) -> dict:
    """A complete stage's manifest; UserError names the stage to run when there is none."""
    file = Path(out, name, MANIFEST)
    if not file.exists():
        raise UserError(
            f"{file.parent} is not a finished stage; run `python -m train.{MAKERS.get(name, name)}` with the same flags first"
        )
    return read_json(file)


def read_json(file: Path) -> Any:
    """A JSON file of ours; UserError when it is damaged."""
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}); remove its folder and run the stage again") from error


def write_json(file: Path, value: Any) -> None:
    """Writes a JSON file so that it is there whole or not at all."""
    write_whole(file, lambda part: part.write_text(json.dumps(value, indent=1) + "\n"))


def write_arrays(file: Path, arrays: dict[str, np.ndarray], save: Callable[..., None] = np.savez) -> None:
    """Writes an .npz so that it is there whole or not at all; `save` may be `numpy.savez_compressed`."""

    def write(part: Path) -> None:
        with open(part, "wb") as handle:
            save(handle, **arrays)

    write_whole(file, write)


def read_arrays(file: Path) -> dict[str, np.ndarray]:
    """An .npz of ours, fully in memory."""
    try:
        with open(file, "rb") as handle, np.load(handle) as data:
            return {name: data[name] for name in data.files}
    except FileNotFoundError as error:
        raise UserError(f"{file} is not there; run the stage that writes it again") from error
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{file} is damaged ({error}); remove it and run the stage again") from error


def read_fields(file: Path, fields: Iterable[str], remedy: str) -> dict[str, np.ndarray]:
    """An .npz of ours that has these arrays; UserError, which ends with the remedy, where it lacks one."""
    arrays = read_arrays(file)
    if missing := {*fields} - {*arrays}:
        raise UserError(f"{file} is damaged (it lacks {', '.join(sorted(missing))}); {remedy}")
    return arrays


def copy_files(folder: Path, to: Path, apart_from: Sequence[str]) -> None:
    """Makes a stage's files, and those in its folders, another's, which keeps those of these names as they are."""
    files = lambda root: {file.relative_to(root) for file in root.rglob("*") if file.is_file()}
    wanted = {file for file in files(folder) if str(file) not in apart_from and not file.name.startswith(".")}
    for gone in {file for file in files(to) - wanted if str(file) not in apart_from}:
        (to / gone).unlink()  # left by a copy that was cut off
    for file in sorted(wanted):
        (to / file).parent.mkdir(parents=True, exist_ok=True)
        write_whole(to / file, lambda part, file=file: shutil.copyfile(folder / file, part))


def is_writer() -> bool:
    """Whether this process writes what all processes of a stage know: the first of them."""
    return jax.process_index() == 0


def write_whole(file: Path, write) -> None:
    """Calls `write` on a neighbour and renames it into place."""
    part = file.with_name(f".{file.name}.part")
    write(part)
    with open(part, "rb") as handle:
        os.fsync(handle.fileno())
    os.replace(part, file)


def _check_same(found: dict, claim: dict, folder: Path) -> None:
    differ = _first_difference({"config": found.get("config"), "parents": found.get("parents")}, claim)
    if differ:
        where, old, new = differ
        raise UserError(
            f"{folder} belongs to another experiment: {where} was {old!r} there and is {new!r} now; "
            "choose another --out, or remove that folder"
        )


def _first_difference(old: Any, new: Any, where: str = "") -> tuple[str, Any, Any] | None:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old:
            found = _first_difference(old[key], new.get(key), f"{where}.{key}".removeprefix(".config").lstrip("."))
            if found:
                return found
        return None
    return None if old == new else (where, old, new)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
