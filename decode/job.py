"""A batch job: its flags, its place among processes, and what it must not change when it goes on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax

from decode import tables
from decode.asked import Known, outside
from jaxspec import sharding
from jaxspec.config import Mesh, UserError
from jaxspec.requests import SETTINGS
from jaxspec.store.facts import draft_length
from jaxspec.store.families import drafter_name
from jaxspec.store.names import digest_of_added
from jaxspec.text import Ask, nodes_of_tables

SAME = ("order", *SETTINGS, "acceptance", "logprobs", "dtype")  # what a job that goes on must not change
LATER = ("online", "remember", "reliability", "drafter")  # the same, of jobs that were begun with one of them


@dataclass(frozen=True, kw_only=True)
class Generate:
    """A batch job; a line's own settings go before these."""

    pool: str
    """Folder of the pool."""
    input: str
    """Prompts: a .jsonl or .jsonl.gz file or a folder of them."""
    output: str
    """File for the completions."""
    order: Literal["input", "completed"] = "input"
    """Records in the order of the prompts, or as they are completed, which holds none back."""
    batch: int = 8
    """Slots: prompts decoded together; a finished one's slot is filled again."""
    admit_rows: int = 1
    """Prompts read together when slots fall free; more suits accelerators."""
    max_new_tokens: int = 128
    """Longest completion, in tokens."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""
    acceptance: Literal["rejection", "gumbel"] = "rejection"
    """Rule above temperature 0: p/q rejection, or Gumbel coupling, whose text does not depend on the drafter."""
    top_k: int | None = None
    """Sample among so many tokens."""
    top_p: float | None = None
    """Sample among the likeliest tokens of this mass."""
    seed: int = 0
    """Seed of sampling."""
    num_speculative_tokens: int | None = None
    """Tokens drafted a round, 0 for none; None is what calibration chose for the batch."""
    drafter: str = ""
    """Drafter of the lines that name none: a task or its label, `mixed`, `base`, `trunk` where there is one, or one that was
    added; or `adaptive`, trigram tables in place of a model, for all lines or for none: of each prompt and its text, and of
    earlier ones, which OUT.trigrams.npz keeps. What records say of drafts then depends on the prompts before, and no text
    does. Empty leaves it to the router."""
    table: str = ""
    """With `adaptive`: a file that such a job has left, to begin with in place of the pool's table."""
    online: bool = False
    """Change a row's drafter within its text for the one that the target agrees with most; a record's drafter is then the one
    that it began with."""
    remember: bool = False
    """With --online: a prompt begins with the drafter that the target agreed with most in earlier texts of its task. What
    records say of drafts, and text that p/q rejection samples, then depends on the prompts before."""
    replay: int | None = None
    """With --online: keep features of so many prompts, and what each drafter would have had accepted, in OUT.replay.npz, from
    which `train.refresh` mends a router that traffic has left behind."""
    reliability: bool = False
    """Leave out specialists that have less accepted than the trunk would. What records say of drafts, and text that p/q
    rejection samples, then depends on the prompts before."""
    logprobs: bool = False
    """Record the target's log probability of each token: as it is, and after the sampling settings."""
    explain: bool = False
    """Print the programs that were compiled, their shapes and seconds."""
    dtype: Literal["", "float32", "bfloat16"] = ""
    """float32 or bfloat16; empty is what the pool was made with."""
    target: str = ""
    """Another place of the pool's target."""
    draft: str = ""
    """Another place of the pool's base drafter."""
    mesh: Mesh = field(default_factory=Mesh)
    """The devices of this process; the slots divide over `data`."""
    processes: int = 1
    """Processes that share the job; each answers its own run of prompts into a part of the output."""
    process: int = 0
    """Which of them this is, from 0."""
    distributed: bool = False
    """Take both from jax.distributed: the same command on every worker of a TPU pod slice, or of a SLURM job."""


def check(config: Generate) -> None:
    """Raises UserError for flags that do not go together."""
    if config.online and config.reliability:
        raise UserError(
            "--online judges drafters within each text, --reliability by whole texts of one; give one of them"
        )
    for flag in ("remember", "replay"):
        if getattr(config, flag) and not config.online:
            raise UserError(f"--{flag} needs --online, which judges all drafters along every text; give both")


def place(config: Generate) -> tuple[int, int]:
    """Which process this is, and of how many."""
    if config.distributed:
        sharding.start()
        return jax.process_index(), jax.process_count()
    if not 0 <= config.process < config.processes:
        raise UserError(f"--process {config.process} is out of range; give a number from 0 to {config.processes - 1}")
    return config.process, config.processes


def drafted(config: Generate, facts: Mapping[str, Any], asks: Sequence[Ask | str]) -> int:
    """Tokens that are drafted a round."""
    if tables.wanted(config.drafter, asks):
        return nodes_of_tables(config.num_speculative_tokens)
    return draft_length(facts, config.num_speculative_tokens, slots=config.batch)


def unchanging(config: Generate, known: Known, asks: Sequence[Ask | str]) -> dict[str, Any]:
    """What the records depend on, the prompts apart; the programs only where they round differently enough to matter."""
    length = drafted(config, known.facts, asks)
    same = {name: getattr(config, name) for name in SAME} | {"pool": known.digest, "num_speculative_tokens": length}
    # None as in jobs that were begun before there was a choice
    same |= {name: getattr(config, name) or None for name in LATER}
    same |= {"table": tables.begins_as(config.pool, config.table) if tables.wanted(config.drafter, asks) else None}
    same |= {"replay": config.replay is not None or None}  # how many are kept is no matter of the records
    if (config.dtype or known.facts["dtype"]) != "float32":
        same |= {"batch": config.batch, "admit_rows": config.admit_rows}
        same |= {"mesh": [config.mesh.data, config.mesh.model], "device": jax.devices()[0].device_kind}
    return same | _added(config, known, asks)


def _added(config: Generate, known: Known, asks: Sequence[Ask | str]) -> dict[str, Any]:
    """What the records depend on where lines name drafters that were added; None as in jobs that could not."""
    named = [drafter_name(known.facts, route) for route in outside(known.facts, asks)]
    added = {name: digest_of_added(Path(config.pool), name) for name in named if name in known.facts["added"]}
    return {"added": added or None}
