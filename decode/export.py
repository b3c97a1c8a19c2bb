"""Writes a pool's drafters for other software: adapters for PEFT, merged drafters for transformers.

    python -m decode.export --pool runs/testbed/pool --to peft --out adapters

Every drafter gets a folder named after it. PEFT folders belong on the pool's base drafter, or on its trunk, which is written
beside them; Hugging Face folders are whole, with the base drafter's config and tokenizer.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from jaxspec.adapters import Whole
from jaxspec.config import UserError, command_line
from jaxspec.store.huggingface import write_tensors
from jaxspec.store.loading import load_pool
from jaxspec.store.peft import write_adapter
from jaxspec.store.pool import Pool

WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".msgpack", ".h5", ".gguf")


@dataclass(frozen=True, kw_only=True)
class Export:
    """What is written, and where to."""

    pool: str
    """Folder of the pool."""
    to: Literal["peft", "hf"]
    """One LoRA adapter a task for PEFT, or every merged drafter as a Hugging Face folder."""
    out: str
    """Folder for the drafters' folders, which must not exist yet; it appears when all of them are written."""
    drafters: tuple[str, ...] = ()
    """Their names, such as `task 0` or `mixed`, and for `hf` what was added, such as `merged-doge`; none means all."""
    target: str = ""
    """Another place of the pool's target."""
    draft: str = ""
    """Another place of the pool's base drafter."""


def run(config: Export) -> None:
    """Writes the folders and says where they are."""
    pool = load_pool(config.pool, target=config.target, draft=config.draft)
    if config.to == "peft" and isinstance(pool.bank, Whole):
        raise UserError(f"{config.pool} has full fine-tunes as specialists, not adapters; export them with --to hf")
    chosen = list(_chosen(config, pool))
    out = Path(config.out)
    if out.exists():
        raise UserError(f"--out {out} exists already; give another folder, or remove it")
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    on = str(pool.pair.draft.path)
    if config.to == "peft" and pool.facts["trunk"]:
        on = str(out.absolute() / "trunk")
        write_drafter(part / "trunk", pool, "trunk")
    for name, folder in tqdm(chosen, desc="export", unit="drafter"):
        if config.to == "peft":
            write_adapter(part / folder, pool.bank, pool.tasks.index(name), on)
        else:
            write_drafter(part / folder, pool, name)
    part.rename(out)
    for _, folder in chosen:
        print(out / folder)


def _chosen(config: Export, pool: Pool) -> Iterator[tuple[str, str]]:
    """Drafters' names and those of their folders."""
    known = pool.tasks if config.to == "peft" else [*pool.names, *pool.added]
    for name in config.drafters or known:
        if name not in known:
            raise UserError(f"--drafters {name!r}: there is no such {config.to} drafter; there are {', '.join(known)}")
        yield name, name.replace(" ", "-")


def write_drafter(folder: Path, pool: Pool, name: str) -> None:
    """Makes the folder: the base drafter's with the weights of the drafter of that name, which transformers loads."""
    draft = pool.pair.draft
    folder.mkdir(parents=True)
    for file in sorted(Path(draft.path).iterdir()):
        if file.is_file() and not file.name.endswith(WEIGHTS):
            shutil.copyfile(file, folder / file.name)
    write_tensors(folder / "model.safetensors", draft.config, pool.drafter(name))


if __name__ == "__main__":
    command_line(Export, run)
