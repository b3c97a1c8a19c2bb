"""A widened model costs more and says the same: equal logits, features and texts; and nothing that is added is free."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode import bench, report, throughput, widened
from decode.settings import Bench
from decode.throughput import Throughput
from jaxspec import pooled, serving, sharding, widening
from jaxspec.config import Mesh, UserError
from jaxspec.requests import Request
from jaxspec.store.facts import calibration, draft_length
from jaxspec.store.families import options
from jaxspec.store.loading import widen
from jaxspec.transformer import LMConfig, Rope, abstract, extend, forward, prefill, unembed
from jaxspec.widening import outline
from tests.conftest import TARGET, random_params

# Small, with what is particular of each: heads a group, size of head, one table or two. The epsilon is large enough to matter.
OLD = dataclasses.replace(TARGET, norm_eps=1e-3)
ODD = dataclasses.replace(
    OLD, num_heads=6, qkv_bias=True, output_bias=True, mlp_bias=True, tied=False, windows=(4, None),
    rope=Rope(kind="llama3", factor=4.0, original_positions=16),
)  # fmt: skip
SHAPES = {
    "llama-2-7b": LMConfig(
        vocab_size=448, width=96, num_layers=3, num_heads=8, num_kv_heads=8, head_dim=16, mlp_width=64, max_positions=9,
        tied=False,
    ),
    "llama-3.2-1b": LMConfig(
        vocab_size=448, width=64, num_layers=3, num_heads=16, num_kv_heads=4, head_dim=8, mlp_width=64, max_positions=9,
        tied=True,
    ),
    "llama-3.1-8b": LMConfig(
        vocab_size=448, width=64, num_layers=3, num_heads=16, num_kv_heads=4, head_dim=16, mlp_width=64, max_positions=9,
        tied=False,
    ),
}  # fmt: skip
FINER = dataclasses.replace(SHAPES["llama-2-7b"], num_kv_heads=4)
CASES = {name: (OLD, shape) for name, shape in SHAPES.items()} | {
    "biases, windows, groups of three in groups of two": (ODD, FINER),
    "a vocabulary of its own": (OLD, dataclasses.replace(SHAPES["llama-3.2-1b"], vocab_size=300)),
}
READ = 16  # tokens of a row's prompt; the rest is read in a window behind it
REQUESTS = [Request(ids=(1, 3, 20 + i, 300, 4), max_new_tokens=12, number=i) for i in range(3)]


def params_of(config: LMConfig) -> dict:
    """Weights with which attention is far from even, and biases that are not zero."""
    params = random_params(config, 0, 6.0)
    drawn = lambda leaf: 0.1 * jax.random.normal(jax.random.key(len(leaf)), leaf.shape)
    own = lambda path, leaf: drawn(leaf) if path[-1].key == "bias" else leaf
    return jax.tree.map_with_path(own, params)


def grown(case: str, seed: int = 1, where=None) -> tuple[LMConfig, dict, LMConfig, dict]:
    """The model before and after."""
    old, shape = CASES[case]
    params = params_of(old)
    return old, params, *widening.widened(old, params, shape, jax.random.key(seed), where)


def said(config: LMConfig, params: dict) -> tuple[dict, dict]:
    """Last hidden states and logits of whole sequences, and of a window behind a cache."""
    tokens = np.random.default_rng(0).integers(0, TARGET.vocab_size, (2, READ + 5))

    @jax.jit
    def run(params, tokens):
        length = jnp.full(2, READ)
        _, cache = prefill(config, params, tokens[:, :READ], length, 32, jnp.float32)
        hidden = {"whole": forward(config, params, tokens)}
        hidden["window"], _ = extend(config, params, cache, tokens[:, READ:], length)
        return hidden, jax.tree.map(lambda own: unembed(config, params, own), hidden)

    return jax.tree.map(np.asarray, run(params, tokens))


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=pytest.mark.slow if name == "llama-3.1-8b" else ()) for name in CASES]
)
def test_logits_and_features_are_the_same(case):
    old, params, new, wide = grown(case)
    assert jax.tree.map(jnp.shape, wide) == jax.tree.map(lambda leaf: leaf.shape, abstract(new))
    states, logits = said(old, params)
    more_states, more_logits = said(new, wide)
    # A sum of n products is off by about sqrt(n) roundings, and there are seven such products a layer.
    steps = 7 * old.num_layers * math.sqrt(new.width) * np.finfo(np.float32).eps
    for way in states:
        known, scale = more_logits[way][..., : old.vocab_size], np.abs(logits[way]).max()
        np.testing.assert_allclose(known, logits[way], rtol=0, atol=steps * scale)
        assert more_logits[way].shape[-1] == new.vocab_size >= old.vocab_size
        assert (more_logits[way][..., old.vocab_size :] < -1e8).all()
        live, dead = np.split(more_states[way], [new.feature_width], axis=-1)
        np.testing.assert_allclose(live, states[way], rtol=0, atol=steps * np.abs(states[way]).max())
        assert dead.shape[-1] == new.width - old.width and not dead.any()


@pytest.mark.parametrize("case", SHAPES)
def test_only_what_must_be_zero_is(case):
    """All else is read and multiplied: no kernel that is added can be left out."""
    old, _, new, wide = grown(case)
    zeros = lambda leaf: int((leaf == 0).sum())
    assert zeros(wide["embed"]["embedding"]) == old.vocab_size * (new.width - old.width)
    assert new.tied or zeros(wide["head"]["kernel"]) == 0
    for number, layer in wide["layers"].items():
        kernels = {name: own["kernel"] for name, own in (layer["attention"] | layer["mlp"]).items() if "kernel" in own}
        added = number >= old.num_layers
        silent = 0 if added else old.width * old.num_heads * (new.head_dim - old.head_dim)
        assert {name: zeros(kernels[name]) for name in ("q", "k", "v", "gate", "up")} == {
            "q": silent, "k": 0, "v": 0, "gate": 0, "up": 0,
        }  # fmt: skip
        kept = {"o": old.num_heads * old.head_dim * old.width, "down": old.mlp_width * old.width}
        for name, own in kept.items():
            assert kernels[name].size - zeros(kernels[name]) == (0 if added else own)
    same, other = (grown(case, seed=seed)[3] for seed in (1, 2))
    alike = lambda tree: jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), wide, tree))
    assert all(alike(same)) and not all(alike(other))


def test_a_mesh_gets_the_same_parameters_in_their_places():
    *_, new, wide = grown("llama-2-7b")
    mesh = sharding.make_mesh(1, 2)
    where = sharding.shardings(sharding.param_specs(abstract(new)), mesh)
    *_, placed = grown("llama-2-7b", where=where)
    assert jax.tree.all(jax.tree.map(lambda leaf, place: leaf.sharding == place, placed, where))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), placed, wide))


@pytest.mark.parametrize("name", widening.NUMBERS)
def test_each_number_that_is_too_small_is_named(name):
    shape = dataclasses.replace(SHAPES["llama-2-7b"], **{name: 1})
    with pytest.raises(
        UserError, match=f"{name.replace('_', ' ')} is 1, the target needs {getattr(OLD, name)}; choose"
    ):
        outline(OLD, shape)


def test_a_model_that_no_shape_holds_is_refused():
    shape = SHAPES["llama-3.2-1b"]
    with pytest.raises(UserError, match="head dim 12 is no multiple of the target's 8"):
        outline(OLD, dataclasses.replace(shape, head_dim=12))
    with pytest.raises(UserError, match="num kv heads is 3, the target needs 4; choose a larger shape"):
        outline(ODD, dataclasses.replace(SHAPES["llama-2-7b"], num_heads=6, num_kv_heads=3))
    with pytest.raises(UserError, match="norms of queries and keys cannot be widened"):
        outline(dataclasses.replace(OLD, qk_norm=True), shape)
    with pytest.raises(UserError, match="choose an untied shape"):
        outline(dataclasses.replace(OLD, tied=False), shape)
    with pytest.raises(UserError, match=r"there is no shape 'llama-70b'; give one of llama-2-7b, llama-3\.2-1b"):
        widening.shape_of("llama-70b")


@pytest.fixture(scope="module")
def wide(loaded):
    """The pool with a wider target."""
    return widen(loaded, SHAPES["llama-2-7b"])


def test_a_pool_with_a_wider_target_has_the_same_texts_routes_and_drafts(loaded, wide):
    done = {}
    for name, pool in (("own", loaded), ("wide", wide)):
        engine = pooled.speculative(pool, 2, slots=2, room=64)
        done[name] = engine.complete(REQUESTS, serving.routed(pool, 2))
    for own, other in zip(done["own"], done["wide"], strict=True):
        assert own.ids == other.ids and own.route == other.route
        assert own.counts.num_accepted_tokens == other.counts.num_accepted_tokens
        np.testing.assert_allclose(other.features, own.features, rtol=0, atol=1e-5)


def test_a_drafter_that_is_the_old_target_loses_nothing(wide, loaded):
    pool = dataclasses.replace(wide, pair=wide.pair._replace(draft=loaded.pair.target))
    for own in pooled.speculative(pool, 3, slots=1, room=64).complete(REQUESTS, serving.always(pool, "base", 1)):
        assert own.counts.num_accepted_tokens == own.counts.num_draft_tokens > 0


def test_draft_lengths_follow_the_rounds_of_the_target_that_is_there(wide, monkeypatch):
    """Where drafting is as good as free the longest length is best, and where it costs a round each, none."""
    known = {"acceptance_length": {name: [[1.0, 1.9, 2.7]] * 3 for name in wide.names}, "further": {}}
    pool = dataclasses.replace(wide, facts={**wide.facts, **known})
    for cost, best in ((0.0, 2), (0.5, 2), (0.87, 1), (1.0, 0)):
        rounds = lambda ways, requests, passes, cost=cost: {
            way: {"round_milliseconds": 1.0 + cost * way[1]} for way in ways
        }
        monkeypatch.setattr(widened, "timed", rounds)
        for slots in (1, 2):
            found = widened.retimed(pool, REQUESTS, (2, 1, 0), slots=slots, room=64)
            assert draft_length(found.facts) == best
        alone = options(widened.retimed(pool, REQUESTS, (0, 1, 2), slots=1, room=64).facts)
        assert alone.families == (("", (best,)),)
        rate = calibration(found.facts)[1]["tokens_per_second"]
        assert rate == pytest.approx(2 * 1.9e3 / (1.0 + cost))


@pytest.fixture
def tiny(monkeypatch):
    """Shapes of the command line small enough to make."""
    monkeypatch.setattr(widening, "SHAPES", SHAPES)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("widening") / "eval.jsonl"
    lines = [{"id": str(i), "task": "one", "prompt": f"stir the onion {i}"} for i in range(3)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


def test_bench_measures_and_names_a_wider_target(pool, prompts, tiny, tmp_path, capsys):
    out = tmp_path / "bench.json"
    shared = {"pool": pool, "prompts": prompts, "passes": 1, "max_new_tokens": 8, "widths": (1,)}
    methods = ("routed", "chosen")
    bench.run(Bench(**shared, methods=methods, widen="llama-2-7b", lengths=(0, 2), json=str(out)))
    told = json.loads(out.read_text())
    assert told["target"] == "target widened to llama-2-7b" and told["target"] in capsys.readouterr().out
    rounds = told["round_milliseconds"][""]
    assert rounds.keys() == {"0", "2"} and min(rounds.values()) > 0 and told["num_speculative_tokens"] == 2
    assert told["router"]["confusion"]["drafters"] and told["rivals"] == {}
    for name in methods:
        assert told["tasks"]["one"][name]["equal_to_autoregressive"] == 1.0
    own = tmp_path / "own.json"
    bench.run(Bench(**shared, methods=("routed",), num_speculative_tokens=2, json=str(own)))
    plain = json.loads(own.read_text())
    for field in ("tokens", "draft_accuracy", "acceptance_by_position"):
        assert plain["mean"]["routed"][field] == told["mean"]["routed"][field]
    report.run(report.ReportConfig(bench=(out, own), out=tmp_path / "report"))
    page = (tmp_path / "report" / "report.html").read_text()
    assert "target widened to llama-2-7b" in page and plain["target"] == "target"


@pytest.mark.slow
def test_throughput_names_a_wider_target(pool, prompts, tiny, tmp_path):
    out = tmp_path / "throughput.json"
    shared = {"pool": pool, "prompts": prompts, "slots": (1,), "passes": 1, "max_new_tokens": 4, "json": str(out)}
    with pytest.raises(UserError, match="--widen needs --num-speculative-tokens"):
        throughput.run(Throughput(**shared, widen="llama-2-7b"))
    throughput.run(Throughput(**shared, widen="llama-2-7b", num_speculative_tokens=2))
    assert json.loads(out.read_text())["target"] == "target widened to llama-2-7b"


def test_what_cannot_be_widened_is_told_before_it_is_made(pool, prompts, tiny, loaded, monkeypatch):
    shared = {"pool": pool, "prompts": prompts, "max_new_tokens": 4, "methods": ("base",)}
    monkeypatch.setattr(widened, "widen", lambda *own: pytest.fail("it was made"))
    for said, changes in {
        "--widen llama-2-7b: a batch of 1 needs .* GiB a device": {"mesh": Mesh(memory=1e-5)},
        "--widen llama-70b: there is no shape": {"widen": "llama-70b"},
        "--lengths 0: one of them must be above 0": {"lengths": (0,)},
        "num_speculative_tokens 99 will not do": {"lengths": (99,)},
        "--lengths goes with --widen": {"lengths": (1,), "num_speculative_tokens": 2},
    }.items():
        with pytest.raises(UserError, match=said):
            bench.run(Bench(**shared | {"widen": "llama-2-7b"} | changes))
    monkeypatch.setattr(widening, "SHAPES", {"small": dataclasses.replace(SHAPES["llama-3.2-1b"], vocab_size=300)})
    assert (
        widened.name_of(widen(loaded, widening.SHAPES["small"]), "small")
        == "target widened to small, its own vocabulary"
    )
