"""What an experiment is: frozen dataclasses of plain values, read from a preset file and overridden by flags.

A preset is a Python file with one name, `experiment`; a variant of it is `dataclasses.replace(preset.experiment, ...)`.
"""

import dataclasses
import math
import runpy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import tyro

Config = TypeVar("Config")
Divergence = Literal[
    "forward_kl",
    "reverse_kl",
    "jensen_shannon",
    "total_variation",
    "total_variation_policy",
    "negative_log_acceptance",
    "negative_log_likelihood",
]


class UserError(Exception):
    """A mistake that the user can mend: one sentence with the value received and the remedy."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """How the log is replayed through base speculative decoding."""

    batch: int = 32
    """Prompts decoded together."""
    max_new_tokens: int = 96
    """Longest completion, in tokens."""
    max_prompt_tokens: int = 512
    """Longer prompts are left out of the trace (and counted)."""
    num_speculative_tokens: int = 4
    """Tokens drafted a round."""
    temperature: float = 0.0
    """Temperature of the target's own output; 0 is greedy."""
    top_logits: int = 32
    """Largest target probabilities kept for every emitted token; the rest is one tail mass."""
    smallest_bucket: int = 64
    """Prompts are padded to at least so many tokens; a large value means fewer programs to compile."""
    texts: Literal["log", "target", "draft", "mix"] = "log"
    """Who writes what is trained on: the log (a line's `response`, the target where it has none), the target, the base
    drafter, or for each prompt one of the three, drawn with the seed. The target scores all; what a drafter wrote is in
    the train split alone."""


@dataclass(frozen=True, kw_only=True)
class Partition:
    """How tasks are found in the trace."""

    features: Literal["hidden", "tfidf", "encoder"] = "hidden"
    """The target's pooled hidden states, TF-IDF with SVD, or a Hugging Face encoder."""
    encoder: str = ""
    """Folder of the encoder, for features=encoder."""
    embed: Literal["prompt", "everything"] = "prompt"
    """The prompt alone, or prompt, base draft and target output (TaskSpec)."""
    num_clusters: int | None = None
    """Number of tasks; None chooses it by silhouette."""
    min_clusters: int = 2
    """Smallest number that the silhouette may choose."""
    max_clusters: int = 16
    """Largest number that the silhouette may choose."""


@dataclass(frozen=True, kw_only=True)
class Align:
    """How drafters are aligned to the target; the mixed control gets the same total of steps x tokens."""

    divergence: Divergence = "forward_kl"
    """What training lowers: a distance from the target's distribution to the drafter's, or -log q of its text alone."""
    beta: float = 0.5
    """Of `jensen_shannon`: the target's share of the mixture that both are compared with."""
    temperature: float = 1.0
    """Temperature that target and drafter are compared at; another than 1 leaves out what the trace did not keep."""
    rank: int = 16
    """Rank of the LoRA adapters."""
    alpha: float = 32.0
    """LoRA scale: the update is alpha / rank times B A."""
    steps: int = 200
    """Optimiser steps of each specialist, its share of the trunk's included."""
    trunk: float = 0.0
    """Share of the steps that go into one full fine-tune on the union, from which specialists and `mixed` both go on."""
    rows: int = 8
    """Packed sequences of one task in a step."""
    row_tokens: int = 256
    """Tokens in a packed sequence."""
    accumulate: int = 1
    """Parts that a step's rows are read in, one after another, where all at once do not fit."""
    select: float = 1.0
    """Share of a step's tokens that count: those where the drafter is furthest behind a reference, which is the same
    drafter trained on all tokens first (AdaSPEC). Below 1 each drafter but the trunk is trained twice."""
    on_policy: float = 0.0
    """Share of a step's rows whose texts the drafters in training have written themselves, at the trace's temperature."""
    refresh: int = 50
    """Steps after which they write anew; it divides checkpoint_every."""
    replay: float = 0.0
    """Share of a specialist's rows that are of any task, so that it stays of use beside its own."""
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    """Candidates for LoRA; the calibrate split chooses."""
    full_learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    """Candidates for full fine-tunes, the trunk's among them."""
    specialists: tuple[Literal["lora", "full"], ...] = ("lora",)
    """Kinds of specialists to train, each for all its steps; of both the calibrate split chooses. Small drafters are mostly
    embedding, which adapters do not reach."""
    mixed: tuple[Literal["lora", "full"], ...] = ("lora", "full")
    """Kinds of the mixed drafter to train; of both the calibrate split chooses. `lora` alone where the optimiser of a full
    fine-tune does not fit."""
    search_steps: int = 20
    """Steps spent on each candidate; one candidate alone is taken without a search."""
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises."""
    evaluate_every: int = 50
    """Steps after which loss and agreement on a sample of the calibrate split are kept for the report's curves, the last step's
    among them; 0 keeps none."""
    checkpoint_every: int = 50
    """Steps between checkpoints."""


@dataclass(frozen=True, kw_only=True)
class Router:
    """The prompt classifier and its fallback."""

    hidden: int = 128
    """Width of the MLP's hidden layer."""
    steps: int = 600
    """Optimiser steps."""
    learning_rate: float = 3e-3
    """Peak learning rate."""
    batch: int = 256
    """Prompts in a step."""
    fallback_below: float = 0.5
    """What adapters belong on, one prompt at a time the base drafter, serves a prompt whose likeliest task is less likely."""


@dataclass(frozen=True, kw_only=True)
class Calibrate:
    """How the number of drafted tokens is chosen on this device."""

    lengths: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7, 8)
    """Numbers of drafted tokens to measure; 0 is autoregressive decoding."""
    prompts: int = 16
    """Calibrate prompts decoded with each."""
    passes: int = 2
    """Interleaved passes; the fastest pass of each length counts."""
    slots: tuple[int, ...] = (1,)
    """Rows decoded together while measuring, on each part of a mesh's rows: as many as the jobs to come will have. Of several
    numbers a job takes the least that is no less than its own."""
    max_new_tokens: int = 64
    """Longest completion while measuring."""
    texts: int = 48
    """Calibrate texts of each task on which every drafter's acceptance is read off."""
    temperature: float = 0.0
    """Temperature of the jobs to come: above 0 drafts are timed under p/q rejection, and what drafters have accepted is an
    expectation along the texts."""
    dtype: Literal["", "float32", "bfloat16"] = ""
    """With --pool: the type of weights and activations that the pool will have from now on; empty is what it was made with."""
    further: tuple[str, ...] = ()
    """Further families of drafters to choose among, one prompt at a time: `ngram`; `adaptive`, trigram tables that begin as the
    pool's, whose trees have as many nodes as chains have tokens, and 16; pools of the same target, whose drafters may have any
    size, as NAME=POOL or NAME=POOL,DRAFT; a Hugging Face folder with a drafter, as NAME=DRAFTER; and the names of drafters that
    were added to this pool."""


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """The devices that a job is spread over: data x model of them."""

    data: int = 1
    """Parts that rows are split in."""
    model: int = 1
    """Parts that heads and vocabulary are split in: the target's, and those of drafters in training."""
    memory: float | None = None
    """Memory of one device in GiB, for the plan; None asks the device."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """From a target, a base drafter and a prompt log to a pool of routed drafters."""

    target: str = ""
    """Hugging Face folder of the target model."""
    draft: str = ""
    """Hugging Face folder of the base drafter; same tokenizer as the target."""
    prompts: str = ""
    """Prompt log: a .jsonl or .jsonl.gz file, or a folder of them."""
    include: tuple[str, ...] = ()
    """Files of the folder to read, named without suffix; none means all."""
    limit: int | None = None
    """Lines taken of each file, sampled with the seed."""
    out: str = ""
    """Folder for the stages and the pool."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of weights and activations; distributions are always float32."""
    seed: int = 0
    """Seed of every random choice."""
    trace: Trace = field(default_factory=Trace)
    partition: Partition = field(default_factory=Partition)
    align: Align = field(default_factory=Align)
    router: Router = field(default_factory=Router)
    calibrate: Calibrate = field(default_factory=Calibrate)
    mesh: Mesh = field(default_factory=Mesh)
    distributed: bool = False
    """Join the job's other processes by jax.distributed and train over all their devices; for train.align alone."""
    pool: str = ""
    """A finished pool to calibrate on this device, by what it keeps, into OUT/pool; for train.calibrate alone."""


@dataclass(frozen=True, kw_only=True)
class Comparison(Experiment):
    """Ways of aligning one drafter, side by side; `align.full_learning_rates` and `align.steps` hold for each of them."""

    divergences: tuple[Divergence, ...] = ("forward_kl", "reverse_kl", "jensen_shannon", "total_variation")
    """What training lowers, one drafter for each and every source."""
    sources: tuple[Literal["log", "target", "draft", "mix", "on-policy"], ...] = ("log", "target", "on-policy")
    """Whose texts a drafter learns from: as `trace.texts`, or those that it writes itself while it learns."""
    drafted: tuple[int, ...] = (3, 5)
    """Drafted tokens that drafters are measured at."""
    temperatures: tuple[float, ...] = (0.0, 1.0)
    """Temperatures that they are measured at."""
    outside: tuple[str, ...] = ()
    """Files of the prompts folder that no drafter is trained on, and that all are measured on."""
    measured: int = 32
    """Prompts of every task that are decoded."""
    slots: int = 32
    """Prompts decoded together."""


def plain(config: Any) -> Any:
    """A config as nested dicts and lists of plain values, as written to manifests."""
    return dataclasses.asdict(config)


def load_preset(path: str) -> Any:
    """Reads the value named `experiment` from a preset file."""
    try:
        namespace = runpy.run_path(path)
    except Exception as error:  # a preset is a program
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"--config {path}: {reason}; give the path of a preset such as configs/testbed.py") from error
    if "experiment" not in namespace:
        raise UserError(f"--config {path} defines no value named `experiment`; see configs/testbed.py for the form")
    return namespace["experiment"]


def command_line(config_type: type[Config], run: Callable[[Config], None], argv: Sequence[str] | None = None) -> None:
    """Parses flags, with `--config PRESET` as their defaults, and runs; a user's mistake ends it with exit code 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        config = _parse(config_type, argv, _program(run))
        check_numbers(config)
        run(config)
    except UserError as error:
        _leave(str(error))
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        _leave(
            f"{place}{error.strerror or error}; what was finished is kept, run the same command again once it is mended"
        )
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)


MAY_BE_ZERO = ("seed", "process", "lengths", "drafted", "num_speculative_tokens", "evaluate_every")
SHARES = ("beta", "trunk", "warmup", "fallback_below", "select", "on_policy", "replay", "mixup")


def check_numbers(config: Any, prefix: str = "--") -> None:
    """Raises UserError for a negative number, a count of nothing, or no value where one is needed."""
    for own in dataclasses.fields(config):
        value, flag = getattr(config, own.name), prefix + own.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            check_numbers(value, f"{flag}.")
        if value == () and own.default not in ((), dataclasses.MISSING):
            raise UserError(f"{flag} is empty; give at least one value, for example {own.default[0]}")
        real = (0, 1 if own.name in SHARES else math.inf)
        least, most = (int(own.name not in MAY_BE_ZERO), 2**31 - 1) if "int" in str(own.type) else real
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float) and not isinstance(number, bool) and not least <= number <= most:
                raise UserError(f"{flag} {number} is out of range; give a number from {least} to {most}")


def _program(run: Callable) -> str:
    """How the user started `run`: its module's name, which is `__main__` while it is the one that runs."""
    main = getattr(sys.modules["__main__"], "__spec__", None)
    name = main.name if main and run.__module__ == "__main__" else run.__module__
    return f"python -m {name.removesuffix('.__main__')}"


def _parse(config_type: type[Config], argv: list[str], program: str) -> Config:
    default = None
    for i, word in enumerate(argv):
        if word == "--config" or word.startswith("--config="):
            path = word.partition("=")[2] or (argv[i + 1] if i + 1 < len(argv) else "")
            default = load_preset(path)
            argv = argv[:i] + argv[i + (1 if "=" in word else 2) :]
            break
    if default is not None and not isinstance(default, config_type):
        wanted, found = config_type.__name__, type(default).__name__
        raise UserError(f"--config: `experiment` is of type {found}, this command takes {wanted}; give flags instead")
    known: dict[str, Any] = {"default": default} if default else {}
    return tyro.cli(config_type, prog=program, args=argv, **known)


def _leave(sentence: str) -> None:
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)
