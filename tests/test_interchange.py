"""Drafters written for other software say there what they say here."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from decode import bench, export
from jaxspec.config import command_line
from jaxspec.store.loading import load_pool
from jaxspec.store.names import extra_file
from jaxspec.store.trees import write_tree
from jaxspec.transformer import forward, unembed
from train import adopt

TOKENS = np.random.default_rng(0).integers(8, 300, size=(2, 17))


def ours(pool, route: int) -> np.ndarray:
    return logits(pool, pool.weights(route))


def logits(pool, weights: dict) -> np.ndarray:
    config = pool.pair.draft.config
    return np.asarray(unembed(config, weights, forward(config, weights, jnp.asarray(TOKENS))))


def theirs(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.float().numpy()


def close(found: np.ndarray, expected: np.ndarray) -> None:
    """Float32 sums of at most 64 terms in another order, through two layers."""
    np.testing.assert_allclose(found, expected, atol=64 * 2**-23 * np.abs(expected).max() * 4)


@pytest.fixture(scope="module")
def folders(pool, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported")
    for to in ("peft", "hf"):
        write(pool, to, out / to)
    return out


def write(pool, to: str, out) -> None:
    command_line(export.Export, export.run, ["--pool", str(pool), "--to", to, "--out", str(out)])


def adapted(base, folder):
    """The adapter of a folder on the model that it names, which is in the folder `base`."""
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's own
def test_an_adapter_on_the_trunk_in_peft_has_the_logits_of_the_merged_drafter(loaded, folders):
    for route, name in enumerate(loaded.tasks):
        model = adapted(folders / "peft" / "trunk", folders / "peft" / name.replace(" ", "-"))
        close(theirs(model), ours(loaded, route))
        assert np.abs(ours(loaded, route) - ours(loaded, -1)).max() > 1e-3  # else the law says nothing


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_without_a_trunk_it_belongs_on_the_base(pool, tmp_path):
    shutil.copytree(pool, tmp_path / "pool")
    manifest = json.loads((tmp_path / "pool" / "manifest.json").read_text())
    manifest["results"]["trunk"] = False
    (tmp_path / "pool" / "manifest.json").write_text(json.dumps(manifest))
    plain = load_pool(str(tmp_path / "pool"))
    assert plain.names[-1] == "base"
    write(plain.path, "peft", tmp_path / "peft")
    close(theirs(adapted(plain.pair.draft.path, tmp_path / "peft" / "task-0")), ours(plain, 0))
    assert np.abs(ours(plain, 0) - ours(plain, -1)).max() > 1e-3


def test_a_merged_drafter_in_transformers_has_its_logits_and_tokenizer(loaded, folders):
    for route, name in enumerate(loaded.names):
        folder = folders / "hf" / name.replace(" ", "-")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        close(theirs(model), ours(loaded, route))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.get_vocab() == loaded.pair.tokenizer.get_vocab()


def test_a_drafter_that_was_added_is_written_for_transformers(pool, loaded, tmp_path):
    shutil.copytree(pool, tmp_path / "pool")
    doubled = jax.tree.map(lambda leaf: 2 * leaf, loaded.mixed)
    write_tree(extra_file(tmp_path / "pool", "mine"), doubled)
    export.run(export.Export(pool=str(tmp_path / "pool"), to="hf", out=str(tmp_path / "hf"), drafters=("mine",)))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf" / "mine", dtype=torch.float32)
    close(theirs(again), logits(loaded, doubled))
    assert [own.name for own in (tmp_path / "hf").iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--drafters", "task 9"], "'task 9': there is no such peft drafter; there are task 0, task 1, task 2"),
        (["--drafters", "mixed"], "'mixed': there is no such peft drafter"),
        ([], "exists already"),
    ],
)
def test_what_cannot_be_written_is_refused_and_nothing_is_lost(pool, folders, capsys, change, said):
    before = sorted(Path(folders).rglob("*"))
    with pytest.raises(SystemExit) as error:
        command_line(
            export.Export, export.run, ["--pool", pool, "--to", "peft", "--out", str(folders / "peft"), *change]
        )
    assert error.value.code == 2 and said in capsys.readouterr().err
    assert sorted(Path(folders).rglob("*")) == before


# Into a pool


@pytest.fixture
def own_pool(pool, tmp_path):
    shutil.copytree(pool, tmp_path / "pool")
    return tmp_path / "pool"


def take_in(pool, adapter, *more) -> None:
    command_line(adopt.Adopt, adopt.run, ["--pool", str(pool), "--adapter", str(adapter), *more])


def write_theirs(base, folder, **changes):
    """An adapter that PEFT made, on two projections; what it adds is large enough to be seen."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"], **changes})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    torch.manual_seed(0)
    for name, leaf in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(leaf, std=0.3)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}])
def test_an_adapter_that_peft_made_drafts_in_a_pool_as_it_does_there(own_pool, tmp_path, changes):
    base = load_pool(str(own_pool))
    model = write_theirs(base.pair.draft.path, tmp_path / "theirs", **changes)
    take_in(own_pool, tmp_path / "theirs", "--name", "mine")
    close(logits(base, load_pool(str(own_pool)).drafter("mine")), theirs(model))
    assert np.abs(logits(base, base.drafter("mine")) - ours(base, base.names.index("base"))).max() > 1e-2


def test_what_a_pool_gave_away_comes_back_the_same_and_is_measured(own_pool, folders, tmp_path):
    take_in(own_pool, folders / "peft" / "task-1", "--name", "again", "--onto", "trunk")
    pool = load_pool(str(own_pool))
    close(logits(pool, pool.drafter("again")), ours(pool, 1))
    settings = {"passes": 1, "max_new_tokens": 8, "widths": (1,), "num_speculative_tokens": 2, "limit": 1}
    bench.run(
        bench.Bench(pool=str(own_pool), json=str(tmp_path / "bench.json"), methods=("again", "oracle"), **settings)
    )
    rows = json.loads((tmp_path / "bench.json").read_text())["mean"]
    assert rows["again"]["equal_to_autoregressive"] == 1.0 and rows["again"]["draft_accuracy"] is not None


@pytest.mark.parametrize(
    ("changes", "name", "said"),
    [
        ({"use_dora": True}, "mine", "use_dora True is not supported"),
        ({"peft_type": "IA3"}, "mine", "peft_type 'IA3' is not supported"),
        ({"r": 5}, "mine", "fits this drafter"),
        ({"r": None}, "mine", "says nothing of r; save the adapter again"),
        ({}, "mixed", "the pool or bench has that name already"),
        ({}, "kitchen", "the pool or bench has that name already"),
        ({}, "routed", "the pool or bench has that name already"),
        ({}, "mine", "belongs on"),  # it was exported with the trunk, and is put on the base
        ({}, "../mine", "will not do"),
        (None, "mine", "has no adapter_config.json"),
    ],
)
def test_an_adapter_that_does_not_belong_is_refused(own_pool, folders, tmp_path, capsys, changes, name, said):
    shutil.copytree(folders / "peft" / "task-0", tmp_path / "theirs")
    file = tmp_path / "theirs" / "adapter_config.json"
    if changes is None:
        file.unlink()
    else:
        said_there = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({key: value for key, value in said_there.items() if value is not None}))
    before = sorted(own_pool.rglob("*"))
    with pytest.raises(SystemExit) as error:
        take_in(own_pool, tmp_path / "theirs", "--name", name)
    assert error.value.code == 2 and said in capsys.readouterr().err
    assert sorted(own_pool.rglob("*")) == before
