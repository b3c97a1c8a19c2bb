"""A folder means to jaxspec what it means to transformers: the same logits, or a refusal that names the reason."""

import json
import pickle
import shutil
from operator import attrgetter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from jaxspec import sharding
from jaxspec.config import UserError
from jaxspec.store import huggingface
from jaxspec.store.huggingface import FAMILIES, named_tensors, read_config, read_model, write_model
from jaxspec.transformer import (
    NARROW,
    LMConfig,
    Rope,
    abstract,
    empty_cache,
    extend,
    forward,
    lay_out,
    rope_frequencies,
    unembed,
)

torch.set_num_threads(1)  # torch's threads spin, and on a shared machine wait for each other

V, H, LAYERS, T, WINDOW = 61, 32, 2, 24, 8
SHAPE = {
    "vocab_size": V, "hidden_size": H, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
QWEN_MIX = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
CASES = {
    "llama2": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "llama3": ("llama", {"tie_word_embeddings": True, "head_dim": 16, "rope_parameters": LLAMA3}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}}),
    "biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": 5, "tie_word_embeddings": False}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True, **QWEN_MIX}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True, "head_dim": 12, "attention_bias": True, **QWEN_MIX}),
}
CONFIG_AND_PARAMS = attrgetter("config", "params")  # of a model
TOKENS = np.random.default_rng(0).integers(0, V, (2, T))
# Rows advance by themselves: the second is read again from where it was rewound to.
STARTS = np.array([[0, 0], [8, 5], [16, 13]])


def torch_model(name: str):
    """A random transformer in float32, large enough in every weight that each of them shows in the logits."""
    kind, changes = CASES[name]
    config = AutoConfig.for_model(kind, **(SHAPE | changes))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            weight.normal_(1.0 if "norm" in key else 0.0, 0.2)
    return model


def torch_logits(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.float().numpy()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`saved(name)`: a folder with the case's checkpoint and the logits that torch gives for TOKENS."""
    known = {}

    def get(name: str):
        if name not in known:
            model, folder = torch_model(name), tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            known[name] = folder, torch_logits(model)
        return known[name]

    return get


@pytest.fixture
def llama(saved, tmp_path):
    """A copy of a good folder, to be damaged."""
    return Path(shutil.copytree(saved("llama2")[0], tmp_path / "llama"))


@jax.jit(static_argnums=0)
def whole(config, params, tokens):
    return unembed(config, params, forward(config, params, tokens))


@jax.jit(static_argnums=0)
def behind(config, params, cache, tokens, start):
    hidden, cache = extend(config, params, cache, tokens, start)
    return unembed(config, params, hidden), cache


def assert_same_logits(ours, theirs):
    # A sum of H products in another order moves by at most H eps of its largest term; a layer nests six such sums.
    bound = 6 * LAYERS * H * np.finfo(np.float32).eps
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=bound * np.abs(theirs).max())


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(saved, name):
    folder, expected = saved(name)
    config, params = CONFIG_AND_PARAMS(read_model(str(folder)))
    assert_same_logits(whole(config, params, TOKENS), expected)


@pytest.mark.parametrize("name", CASES)
def test_windows_behind_a_cache_equal_transformers(saved, name):
    folder, expected = saved(name)
    config, params = CONFIG_AND_PARAMS(read_model(str(folder)))
    cache = empty_cache(config, 2, slots=T + 3)
    for start in STARTS:
        at = start[:, None] + np.arange(WINDOW)
        logits, cache = behind(config, params, cache, np.take_along_axis(TOKENS, at, 1), start)
        assert_same_logits(logits, np.take_along_axis(expected, at[..., None], 1))


@jax.jit(static_argnums=0)
def windows(config, params, tokens):
    """Logits of windows of 1, 3 and 8 tokens, one behind the other."""
    cache, logits = empty_cache(config, 2, T), []
    for at, width in ((0, 1), (1, 3), (4, 8)):
        hidden, cache = extend(config, params, cache, tokens[:, at : at + width], jnp.full(2, at))
        logits.append(unembed(config, params, hidden))
    return jnp.concatenate(logits, axis=1)


@pytest.mark.parametrize("name", CASES)
def test_weights_laid_out_are_the_same_model(saved, name):
    """V is no multiple of a block; the whole texts are more rows than blocks are used for."""
    config, params = CONFIG_AND_PARAMS(read_model(str(saved(name)[0])))
    placed = lay_out(params)
    assert TOKENS.size > NARROW
    assert_same_logits(whole(config, placed, TOKENS), whole(config, params, TOKENS))
    assert_same_logits(windows(config, placed, TOKENS), windows(config, params, TOKENS))


@pytest.mark.parametrize("tied", [True, False])
def test_blocks_give_the_product_at_every_number_of_rows(saved, tied):
    config, params = CONFIG_AND_PARAMS(read_model(str(saved("qwen2" if tied else "llama2")[0])))
    assert config.tied == tied
    placed = lay_out(params)
    hidden = np.random.default_rng(1).normal(size=(NARROW + 2, H)).astype(np.float32)
    for rows in (*range(1, 9), NARROW, NARROW + 1):
        expected = unembed(config, params, hidden[:rows])
        assert_same_logits(unembed(config, placed, hidden[:rows]), expected)


def test_llama3_scaling_reaches_all_three_bands():
    rope = Rope(kind="llama3", factor=8.0, original_positions=64)
    kept = np.asarray(rope_frequencies(rope, 16) / rope_frequencies(Rope(), 16))
    np.testing.assert_allclose([kept.max(), kept.min()], [1, 1 / 8], rtol=1e-6)
    assert ((kept > 0.2) & (kept < 0.9)).any()


def test_a_sharded_checkpoint_is_read_whole(saved, tmp_path):
    torch_model("qwen2").save_pretrained(tmp_path, max_shard_size="12KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_equal_trees(read_model(str(tmp_path)).params, read_model(str(saved("qwen2")[0])).params)


@pytest.mark.parametrize("shape", [(1, 2), (2, 2), (2, 1)])
@pytest.mark.parametrize("name", ["llama2", "qwen2"])
def test_a_checkpoint_is_read_straight_into_its_sharding(saved, monkeypatch, name, shape):
    """The same arrays, of which each part is read once and the whole never where it is split."""
    folder = str(saved(name)[0])
    config = read_config(folder)
    mesh = sharding.make_mesh(*shape, jax.devices("cpu"))
    # V is odd: the tables are split along the width instead.
    wide = {"embed": {"embedding": P(None, "model")}, "head": {"kernel": P("model", None)}}
    specs = {name: wide.get(name, own) for name, own in sharding.param_specs(abstract(config)).items()}
    reads, whole = [], huggingface._ranged
    monkeypatch.setattr(huggingface, "_ranged", lambda *a: (value := whole(*a), reads.append(value.nbytes))[0])
    model = read_model(folder, shardings=sharding.shardings(specs, mesh))
    assert_equal_trees(model.params, read_model(folder).params)
    leaves = jax.tree.leaves(model.params)
    parts = [own.nbytes // len({str(s.index) for s in own.addressable_shards}) for own in leaves]
    number = [own.nbytes // part for own, part in zip(leaves, parts)]
    expected = [part for part, times in zip(parts, number) for _ in range(times)]
    assert reads[: len(expected)] == expected
    assert len(reads) == len(expected) + len(leaves)
    if shape[1] == 2:
        split = [leaf.nbytes for leaf, part in zip(leaves, parts) if part < leaf.nbytes]
        assert sum(split) > 0.9 * sum(leaf.nbytes for leaf in leaves)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_bfloat16_checkpoints_are_read_exactly(tmp_path, dtype):
    model = torch_model("biased").to(torch.bfloat16)
    with torch.no_grad():
        for weight in model.parameters():
            weight.view(-1)[:2] = torch.tensor([1e30, -1e-30])  # no other type of 16 bits holds these
    model.save_pretrained(tmp_path)
    written = {name: weight.float().numpy() for name, weight in model.state_dict().items()}
    config, params = CONFIG_AND_PARAMS(read_model(str(tmp_path), dtype))
    for name, leaf, transpose in named_tensors(config, params):
        assert leaf.dtype == dtype
        np.testing.assert_array_equal(leaf.astype(jnp.float32), written[name].T if transpose else written[name])


def assert_equal_trees(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("name", CASES)
def test_transformers_loads_what_is_written(saved, tmp_path, name):
    model = read_model(str(saved(name)[0]))
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), model.params)
    write_model(tmp_path, model.config, params, family=CASES[name][0])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    assert_same_logits(whole(model.config, params, TOKENS), torch_logits(loaded))
    again = read_model(str(tmp_path))
    assert again.config == model.config
    assert_equal_trees(again.params, params)


@pytest.mark.parametrize("tied", [True, False])
def test_a_padded_vocabulary_has_no_probability(tied):
    shape = {"num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "head_dim": 8, "mlp_width": 8, "max_positions": 8}
    config = LMConfig(vocab_size=7, width=8, tied=tied, **shape)
    draw = np.random.default_rng(0).normal
    params = jax.tree.map(lambda leaf: draw(size=leaf.shape).astype(leaf.dtype), abstract(config))
    hidden = draw(size=(2, 3, 8)).astype(np.float32)
    logits = unembed(config, params, hidden)
    wider, narrower = unembed(config, params, hidden, 10), unembed(config, params, hidden, 5)
    np.testing.assert_array_equal(jax.nn.softmax(wider)[..., 7:], np.zeros((2, 3, 3)))
    np.testing.assert_array_equal(wider[..., :7], logits)
    np.testing.assert_array_equal(narrower, logits[..., :5])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "gpt2"}, "'gpt2'.*llama, mistral, qwen2, qwen3"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config.*gptq"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "'yarn'"),
        ({"hidden_size": "wide"}, "config.json.*hidden_size"),
        ({"intermediate_size": 40}, r"mlp\.\w+_proj\.weight has shape"),
        ({"attention_bias": True}, r"self_attn\.\w_proj\.bias is missing"),
    ],
)
def test_an_unsupported_config_is_refused_by_name(llama, change, named):
    file = llama / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=named):
        read_model(str(llama))


def test_a_missing_shard_is_named(tmp_path):
    torch_model("llama2").save_pretrained(tmp_path, max_shard_size="12KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=f"names {shard.name}, which is not there"):
        read_model(str(tmp_path))


@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 0.999])
def test_a_truncated_file_is_named(llama, kept):
    file = llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(kept * file.stat().st_size)])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        read_model(str(llama))


def test_a_missing_tensor_is_named(llama):
    tensors = load_file(llama / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, llama / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.layers\.1\.self_attn\.k_proj\.weight is missing"):
        read_model(str(llama))


class Bomb:
    """Unpickled, it leaves a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_a_pickle_is_refused_unopened(llama):
    mark = llama / "opened"
    (llama / "model.safetensors").unlink()
    (llama / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle"):
        read_model(str(llama))
    assert not mark.exists()


@pytest.mark.parametrize("name", ["", "nowhere", "."])
def test_a_folder_without_a_model_is_named(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"'{name}' is not a model folder"):
        read_model(name)


def test_every_family_is_compared():
    assert {kind for kind, _ in CASES.values()} == set(FAMILIES)
