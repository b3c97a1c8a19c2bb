"""Drafters written for other software say there what they say here."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from decode import export
from jaxspec.config import command_line
from jaxspec.store.pool import load_pool
from jaxspec.transformer import forward, unembed

TOKENS = np.random.default_rng(0).integers(8, 300, size=(2, 17))


def ours(pool, route: int) -> np.ndarray:
    config, weights = pool.pair.draft.config, pool.weights(route)
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
