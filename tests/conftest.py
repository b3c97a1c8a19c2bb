"""A world small enough for a test: two random models of one tokenizer, a prompt log of three tasks, and their pool."""

import contextlib
import dataclasses
import fcntl
import json
import os
import random
import resource
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from jaxspec.config import Align, Calibrate, Experiment, Partition, Router, Trace
from jaxspec.store.huggingface import write_model
from jaxspec.store.loading import load_pool
from jaxspec.store.pool import Pool
from jaxspec.transformer import LMConfig, init
from train import __main__ as pipeline

SPECIALS = ["<pad>", "<bos>", "<eos>", "<user>", "<assistant>"]
EOS = SPECIALS.index("<eos>")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WORDS = {
    "kitchen": "stir the onion butter garlic soup into pepper oven bake salt lemon sugar",
    "sailing": "hoist our anchor mast harbour wind rudder before tide deck knot keel buoy",
    "algebra": "prove every matrix kernel ring ideal prime whose field vector norm basis trace",
}
LINES = 20
# Files that take longest, and the first does not need the pool that the second makes: workers end together.
FIRST = ("decoding", "jobs", "bench", "engine", "huggingface", "rivals", "sharding", "bad_input", "gumbel", "recording")
FIRST += ("hosts",)
TARGET = LMConfig(
    vocab_size=400, width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=48, max_positions=160,
    tied=True,
)  # fmt: skip
# Its vocabulary is padded further than the target's.
DRAFT = dataclasses.replace(
    TARGET, vocab_size=416, width=16, num_layers=1, num_heads=2, mlp_width=24, max_positions=192
)


class World(NamedTuple):
    """Folders of the target, the drafter and the prompt log."""

    target: Path
    draft: Path
    prompts: Path


def pytest_configure(config: pytest.Config) -> None:
    """A program is compiled once a session: commands that are run again, and there are many, take seconds."""
    jax.config.update("jax_num_cpu_devices", 8)  # for meshes; what is not placed lives on the first, as ever
    if hasattr(config, "workerinput"):  # a worker has its parent's environment, which JAX has read
        return
    folder = tempfile.TemporaryDirectory()
    config.add_cleanup(folder.cleanup)
    settings = {"compilation_cache_dir": folder.name}
    settings |= {"persistent_cache_min_compile_time_secs": 0.0, "persistent_cache_min_entry_size_bytes": -1}
    for name, value in settings.items():
        jax.config.update(f"jax_{name}", value)
        os.environ[f"JAX_{name.upper()}"] = str(value)  # workers, and processes that a test starts, share it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With `--no-loadscope-reorder` workers take files in this order."""
    order = {f"test_{name}": number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="session")
def together(tmp_path_factory) -> Path:
    """A folder that is the same in all workers of the session."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def world(together) -> World:
    """Models and log on disk, made once; to be copied before anything in it is damaged."""
    own = World(together / "target", together / "draft", together / "log")
    with one_at_a_time(together):
        if not own.draft.exists():
            write_log(own.prompts)
            tokenizer = make_tokenizer()
            for number, (folder, config, strength) in enumerate(((own.target, TARGET, 3.0), (own.draft, DRAFT, 1.5))):
                write_model(folder, config, random_params(config, number, strength), extra={"eos_token_id": EOS})
                tokenizer.save_pretrained(folder)
    return own


@pytest.fixture(scope="session")
def experiment(world) -> Experiment:
    """Every stage in its smallest size; `out` is still to be given."""
    rates = {"learning_rates": (5e-3,), "full_learning_rates": (1e-3,)}
    return Experiment(
        target=str(world.target),
        draft=str(world.draft),
        prompts=str(world.prompts),
        trace=Trace(batch=8, max_new_tokens=12, max_prompt_tokens=100, num_speculative_tokens=2, top_logits=8),
        partition=Partition(num_clusters=3),
        align=Align(rank=4, alpha=4.0, steps=4, trunk=0.5, rows=2, row_tokens=64, checkpoint_every=2, **rates),
        router=Router(hidden=16, steps=60, batch=32),
        calibrate=Calibrate(lengths=(1, 2), prompts=2, passes=1, max_new_tokens=12),
    )


@pytest.fixture(scope="session")
def preset(experiment, tmp_path_factory) -> str:
    """The experiment as a file for `--config`."""
    file = tmp_path_factory.mktemp("preset") / "tiny.py"
    file.write_text(f"from jaxspec.config import *\n\nexperiment = {experiment!r}\n")
    return str(file)


@pytest.fixture(scope="session")
def finished(experiment, together) -> Experiment:
    """The experiment after `python -m train`, with all stages in `out`; to be copied before anything in it is changed."""
    done = dataclasses.replace(experiment, out=str(together / "finished"))
    with one_at_a_time(together):
        pipeline.run(done)  # what another worker has finished is skipped
    return done


@pytest.fixture(scope="session")
def pool(finished) -> str:
    """Folder of the finished pool."""
    return str(Path(finished.out, "pool"))


@pytest.fixture(scope="session")
def loaded(pool) -> Pool:
    """The finished pool in memory."""
    return load_pool(pool)


@pytest.fixture(scope="session")
def corrupted(loaded):
    """A pool of which calibration says that all specialists are good, while two of them have become noise."""
    noise = lambda x: x.at[:2].set(3 * jax.random.normal(jax.random.key(x.size), x[:2].shape))
    bank = [{name: (a, noise(b)) for name, (a, b) in layer.items()} for layer in loaded.bank]
    lengths = loaded.facts["acceptance_length"]
    better = {name: [[9.0] * len(own) for own in lengths["trunk"]] for name in loaded.tasks}
    facts = loaded.facts | {"acceptance_length": lengths | better, "fallback_below": 0.0}
    return dataclasses.replace(loaded, bank=bank, facts=facts)


@pytest.fixture
def out_with(finished, tmp_path):
    """`out_with(*stages)`: a folder for `--out` that holds copies of these finished stages."""

    def copy(*stages: str) -> Path:
        for stage in stages:
            shutil.copytree(Path(finished.out, stage), tmp_path / "out" / stage)
        return tmp_path / "out"

    return copy


@contextlib.contextmanager
def one_at_a_time(folder: Path):
    """Workers take turns."""
    with open(folder / "turn", "w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def small_files(most: int):
    """No file can grow beyond so many bytes: the kernel refuses what a full disk would."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def write_log(folder: Path) -> None:
    """One file a task; no two tasks share a word."""
    folder.mkdir()
    draw = random.Random(0)
    for task, words in WORDS.items():
        sentences = [" ".join(draw.choices(words.split(), k=draw.randint(4, 8))) for _ in range(LINES)]
        lines = [json.dumps({"id": f"{task}-{i}", "prompt": own, "task": task}) for i, own in enumerate(sentences)]
        (folder / f"{task}.jsonl").write_text("\n".join(lines) + "\n")


def make_tokenizer(words: str = " ".join(WORDS.values())) -> PreTrainedTokenizerFast:
    """A byte-level BPE that knows the log's words, with a chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    settings = {"special_tokens": SPECIALS, "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    trainer = trainers.BpeTrainer(vocab_size=TARGET.vocab_size, show_progress=False, **settings)
    bpe.train_from_iterator([words], trainer)
    named = dict(zip(("pad_token", "bos_token", "eos_token"), SPECIALS, strict=False))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=TEMPLATE, **named)


def random_params(config: LMConfig, seed: int, strength: float) -> dict:
    """Weights strong enough that texts do more than repeat, weak enough that the drafter is right now and then."""
    params = jax.jit(init, static_argnums=0)(config, jax.random.key(seed))
    return params | {"layers": jax.tree.map(lambda x: strength * x if x.ndim > 1 else x, params["layers"])}
