"""The plan is what is there: numbers by hand, bytes as placed, and presets without weights."""

import dataclasses
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from decode import plan as command
from jaxspec import plan, recording, sharding
from jaxspec.config import UserError, load_preset
from jaxspec.plan import GIB, Load
from jaxspec.published import PUBLISHED
from jaxspec.transformer import abstract, empty_cache, init
from tests import fleet

ROOT = Path(__file__).parents[1]
PRESETS = ("llama31_8b_v5e8", "qwen25_7b_80gb")
LOAD = Load(batch=8, prompt_tokens=20, max_new_tokens=24, num_speculative_tokens=3, dtype="float32", tasks=3, rank=4)
PARAMETERS = {
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "JackFram/llama-68m": 68_030_208,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
}


def sizes(load: Load, data: int, model: int) -> dict[tuple[str, str], int]:
    rows = plan.plan(fleet.TARGET, fleet.DRAFT, load, sharding.abstract_mesh(data, model))
    return {(row.kind, row.name): row.bytes for row in rows}


def test_bytes_are_those_computed_by_hand():
    found = sizes(LOAD, 4, 2)
    slots, rows, split = 80, 8 // 4, 2  # 32 + 24 + 17, rounded up to 16
    attention, mlp, table = 4 * 32 * 32, 3 * 32 * 64, 64 * 32
    target = (2 * table + 2 * (attention + mlp)) // split + 5 * 32
    drafter = 2 * 64 * 16 + 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 32 + 3 * 16
    adapter = 4 * (2 * (16 + 16) + 2 * (16 + 8) + 3 * (16 + 32))
    # tokens, then length, stop, draft limit, temperature, top-k, top-p, a key of two words, and two flags of a byte;
    # then how many rounds, and of each where it began, what it drafted and what was accepted
    buffers = rows * (4 * slots + 6 * 4 + 8 + 2 + 4 + 3 * 4 * slots)
    assert found == {
        ("weights", "target"): 4 * target,
        ("weights", "base drafter"): 4 * drafter,
        ("weights", "mixed, trunk, merged drafters"): 0,
        ("weights", "LoRA bank, 3 tasks"): 4 * 3 * adapter,
        ("state", "target cache"): 4 * 2 * 2 * rows * slots * 8 * 4 // split + 4 * rows,
        ("state", "drafter cache"): 4 * 2 * rows * slots * 2 * 4 + 4 * rows,
        ("state", "rows' own adapters"): 4 * rows * adapter,
        ("state", "tokens, rounds and records"): buffers,
        ("prefill", "target cache"): 4 * 2 * 2 * rows * slots * 8 * 4 // split + 4 * rows,
        ("prefill", "drafter cache"): 4 * 2 * rows * slots * 2 * 4 + 4 * rows,
        ("prefill", "attention scores [B, heads, P, L] x 2"): 2 * 4 * rows * (8 // split) * 32 * slots,
        ("prefill", "gate, up, hidden [B, P, H]"): 4 * rows * 32 * (2 * 64 // split + 32),
        ("round", "attention scores [B, heads, W, L] x 2"): 2 * 4 * rows * (8 // split) * 4 * slots,
        ("round", "logits, log p, law [B, W, V]"): 3 * 4 * rows * 4 * 64,
        ("round", "log q [B, K, V]"): 4 * rows * 3 * 64,
    }


@pytest.mark.parametrize("shape", [(4, 2), (1, 8), (8, 1)])
def test_bytes_are_those_that_a_device_holds(shape):
    mesh = sharding.make_mesh(*shape, jax.devices("cpu"))
    params, cache = init(fleet.TARGET, jax.random.key(0)), empty_cache(fleet.TARGET, 8, 80)
    placed = sharding.place(params, sharding.param_specs(params), mesh)
    caches = sharding.place(cache, sharding.row_specs(cache, "target"), mesh)
    held = lambda tree: sum(leaf.addressable_shards[3].data.nbytes for leaf in jax.tree.leaves(tree))
    found = sizes(LOAD, *shape)
    assert found["weights", "target"] == held(placed)
    assert found["state", "target cache"] == held(caches) + 4 * 8 // shape[0]


@pytest.mark.parametrize("logprobs", [False, True])
def test_the_state_is_what_an_engine_holds(logprobs):
    room = 80
    recorder = recording.logprobs(room) if logprobs else recording.NOTHING
    case = fleet.CASES["sampled"]
    own = fleet.engine(case, room=room, recorder=recorder)
    state = jax.eval_shape(own._empty[0], fleet.weights(case.adapters))
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    load = dataclasses.replace(LOAD, logprobs=logprobs)
    assert held == sum(size for (kind, _), size in sizes(load, 1, 1).items() if kind == "state")


def test_the_total_has_the_larger_workspace_only():
    rows = [plan.Row(kind, kind, size) for kind, size in (("weights", 1), ("state", 2), ("prefill", 4), ("round", 8))]
    assert plan.total(rows) == 11
    assert plan.total([*rows, plan.Row("prefill", "more", 100)]) == 107
    assert plan.table([plan.Row("weights", "target", 3 * GIB // 2)]).count("1.500") == 2


@pytest.mark.parametrize("data", [1, 4])
def test_the_largest_batch_fits_and_the_next_does_not(data):
    mesh = sharding.abstract_mesh(data, 2)
    need = lambda batch: plan.total(plan.plan(fleet.TARGET, fleet.DRAFT, dataclasses.replace(LOAD, batch=batch), mesh))
    memory = need(12 * data)
    largest = lambda memory: plan.largest_batch(fleet.TARGET, fleet.DRAFT, LOAD, mesh, memory)
    assert [largest(memory), largest(memory - 1), largest(need(data) - 1)] == [12 * data, 11 * data, 0]


def test_a_batch_that_does_not_fit_is_refused_with_the_largest_that_does():
    target, draft = PUBLISHED["Qwen/Qwen2.5-7B"], PUBLISHED["Qwen/Qwen2.5-0.5B"]
    load = Load(batch=64, prompt_tokens=1024, max_new_tokens=256, num_speculative_tokens=4)
    mesh = sharding.abstract_mesh(1, 1)
    assert plan.fit(target, draft, load, mesh) == plan.fit(target, draft, load, mesh, 80 * GIB)
    with pytest.raises(UserError) as refusal:
        plan.fit(target, draft, load, mesh, 40 * GIB)
    said = r"a batch of 64 needs ([\d.]+) GiB a device, 40\.0 GiB is there; the largest that fits is (\d+)"
    need, largest = re.fullmatch(said, str(refusal.value)).groups()
    assert float(need) > 40 and 0 < int(largest) < 64
    with pytest.raises(UserError, match="not one row fits, split over more devices"):
        plan.fit(target, draft, load, mesh, 10 * GIB)
    with pytest.raises(UserError, match=r"does not divide the target's 28 heads; give one of 1, 2, 4$"):
        plan.fit(target, draft, load, sharding.abstract_mesh(1, 8))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_have_the_published_number_of_parameters(name):
    shapes = abstract(PUBLISHED[name], jnp.bfloat16)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == PARAMETERS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_plan_is_printed_without_weights(name, capsys):
    experiment = load_preset(str(ROOT / "configs" / f"{name}.py"))
    command.run(experiment)
    out = capsys.readouterr().out
    weights = PARAMETERS[experiment.target] * 2 / experiment.mesh.model / GIB
    # Norms, whole on every device, are the rest.
    assert float(re.search(r"weights +target +([\d.]+)", out).group(1)) == pytest.approx(weights, abs=1e-3)
    assert int(re.search(r"largest batch that fits is (\d+)", out).group(1)) >= experiment.trace.batch
    small = dataclasses.replace(experiment, mesh=dataclasses.replace(experiment.mesh, memory=9.0))
    with pytest.raises(UserError, match=r"GiB a device, 9\.0 GiB is there"):
        command.run(small)


def test_a_model_that_is_nowhere_is_named():
    with pytest.raises(UserError, match="'nowhere' is neither a model folder nor one of meta-llama"):
        command.shape_of("nowhere")
