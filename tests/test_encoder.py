"""An encoder's folder means what it means to transformers: the same mean-pooled vectors, whoever shares the batch."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedTokenizerFast

from jaxspec.config import UserError
from jaxspec.store import encoders
from jaxspec.store.encoders import BERT_FAMILIES, embed

torch.set_num_threads(1)  # torch's threads spin, and on a shared machine wait for each other

H, LAYERS, POSITIONS = 24, 2, 60
SPECIAL = {"bert": ("[PAD]", "[CLS]", "[SEP]", "[UNK]"), "roberta": ("<s>", "<pad>", "</s>", "<unk>")}
WORDS = [f"w{i}" for i in range(40)]
SHAPE = {
    "vocab_size": 48, "hidden_size": H, "num_hidden_layers": LAYERS, "num_attention_heads": 3, "intermediate_size": 40,
    "max_position_embeddings": POSITIONS,
}  # fmt: skip
CASES = {
    "bert": ("bert", {"hidden_act": "gelu"}),
    "bert-new": ("bert", {"hidden_act": "gelu_new", "type_vocab_size": 1}),
    "roberta": ("roberta", {"pad_token_id": 1, "type_vocab_size": 1}),
    "xlm-roberta": ("xlm-roberta", {"pad_token_id": 1, "layer_norm_eps": 1e-5}),
    "llama": ("llama", {"num_key_value_heads": 3}),
}
draw = np.random.default_rng(0)
TEXTS = [" ".join(draw.choice(WORDS, n)) for n in (3, 1, 40, 12, 200, 0, 29, 31, 7)] + ["w1 <pad> w2 [PAD] w3"]


def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Words to ids between two special tokens; its file asks for padding, as those of sentence encoders do."""
    special = SPECIAL["bert" if kind == "bert" else "roberta"]
    ids = {word: i for i, word in enumerate([*special, *WORDS])}
    pad, unknown = (next(word for word in special if name in word.lower()) for name in ("pad", "unk"))
    first, last = (special[1], special[2]) if kind == "bert" else (special[0], special[2])
    inner = Tokenizer(models.WordLevel(ids, unk_token=unknown))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [(first, ids[first]), (last, ids[last])]
    inner.post_processor = processors.TemplateProcessing(single=f"{first} $A {last}", special_tokens=ends)
    inner.enable_padding(pad_id=ids[pad], pad_token=pad, length=64)
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=pad, unk_token=unknown)


def torch_model(name: str, auto=AutoModel):
    """A random encoder whose every weight is large enough to show in the vectors."""
    kind, changes = CASES[name]
    config = AutoConfig.for_model(kind, **(SHAPE | changes))
    torch.manual_seed(0)
    model = auto.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            weight.normal_(1.0 if "norm.weight" in key.lower() else 0.0, 0.3)
    return model


def torch_vectors(name: str, model, longest: int) -> np.ndarray:
    """Sentence-transformers' mean pooling, one text at a time."""
    words, rows = tokenizer(CASES[name][0]), []
    for text in TEXTS:
        batch = words(text, truncation=True, max_length=longest, return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None].float()
        mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        rows.append(torch.nn.functional.normalize(mean, dim=-1)[0].numpy())
    return np.stack(rows)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`saved(name)`: a folder with the case's checkpoint and tokenizer."""
    known = {}

    def get(name: str) -> Path:
        if name not in known:
            known[name] = tmp_path_factory.mktemp(name)
            torch_model(name).save_pretrained(known[name])
            tokenizer(CASES[name][0]).save_pretrained(known[name])
        return known[name]

    return get


@pytest.fixture
def bert(saved, tmp_path):
    """A copy of a good folder, to be damaged."""
    return Path(shutil.copytree(saved("bert"), tmp_path / "bert"))


def assert_same_vectors(ours, theirs):
    # A sum of H products in another order moves by at most H eps of its largest term; a layer nests six such sums.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=6 * LAYERS * H * np.finfo(np.float32).eps)


@pytest.mark.parametrize("name", CASES)
def test_vectors_equal_transformers(saved, name):
    longest = POSITIONS - (2 if "roberta" in name else 0)
    ours = embed(TEXTS, str(saved(name)), batch=4)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, rtol=4 * np.finfo(np.float32).eps)
    assert_same_vectors(ours, torch_vectors(name, torch_model(name), longest))


@pytest.mark.parametrize("name", ["bert", "roberta", "llama"])
def test_a_text_does_not_see_its_batch_or_its_padding(saved, name, monkeypatch):
    together = embed(TEXTS, str(saved(name)), batch=4)
    monkeypatch.setattr(encoders, "SHORTEST", 128)  # every text in the longest bucket
    assert_same_vectors(embed(TEXTS[::-1], str(saved(name)), batch=4)[::-1], together)


def test_few_programs_serve_any_log(saved):
    folder = str(saved("bert"))
    embed(TEXTS, folder, batch=4)
    compiled = encoders._pooled._cache_size()
    embed([" ".join(WORDS[:n]) for n in range(40)], folder, batch=4)
    assert encoders._pooled._cache_size() == compiled


def test_long_texts_share_a_program_in_smaller_numbers():
    ids = [[0] * 700, [0] * 3000, [0] * 5, [0] * 600]
    shapes = [tokens.shape for _, tokens, _ in encoders._batches(ids, longest=2500 + 600, batch=4)]
    assert shapes == [(4, 32), (2, 1024), (1, 3100)]


def test_no_text_and_no_token_are_allowed(saved, bert):
    assert embed([], str(bert)).shape == (0, H)
    bare = Tokenizer.from_file(str(saved("llama") / "tokenizer.json"))
    bare.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    bare.save(str(bert / "tokenizer.json"))
    np.testing.assert_array_equal(embed([""], str(bert), batch=4), np.zeros((1, H)))


@pytest.mark.parametrize("name", ["bert", "roberta", "xlm-roberta", "llama"])
def test_a_language_model_is_read_under_its_prefix(tmp_path, name):
    model = torch_model(name, AutoModelForCausalLM if name == "llama" else AutoModelForMaskedLM)
    model.save_pretrained(tmp_path)
    tokenizer(CASES[name][0]).save_pretrained(tmp_path)
    longest = POSITIONS - (2 if "roberta" in name else 0)
    assert_same_vectors(embed(TEXTS, str(tmp_path), batch=4), torch_vectors(name, model.base_model, longest))


def test_norms_may_be_called_gamma_and_beta(saved, bert):
    tensors = load_file(bert / "model.safetensors")
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    rename = lambda key: next((key.replace(new, was) for new, was in old.items() if key.endswith(new)), key)
    save_file({rename(key): value for key, value in tensors.items()}, bert / "model.safetensors")
    np.testing.assert_array_equal(embed(TEXTS, str(bert), batch=4), embed(TEXTS, str(saved("bert")), batch=4))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "distilbert"}, "'distilbert'.*bert, roberta, xlm-roberta, llama, mistral, qwen2, qwen3"),
        ({"hidden_act": "relu"}, "hidden_act='relu'.*'gelu' or 'gelu_new'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
        ({"is_decoder": True}, "is_decoder=True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": None}, "config.json cannot be understood"),
        ({"num_hidden_layers": 3}, "encoder.layer.2.*is missing"),
    ],
)
def test_an_unsupported_config_is_refused_by_name(bert, change, named):
    file = bert / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=named):
        embed(TEXTS, str(bert), batch=4)


def test_every_family_is_compared():
    assert {kind for kind, _ in CASES.values()} >= set(BERT_FAMILIES)
