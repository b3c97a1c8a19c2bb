"""The floor is what arrays weigh, steps are timed without what surrounds them, and chains do what single calls do."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode import chains, device
from decode import roofline as command
from decode.device import NotMeasured
from decode.subjects import Drafting, Load, Roofline, Subject, subjects
from jaxspec import roofline
from jaxspec.adapters import PROJECTIONS, Stacked, Whole, stack
from jaxspec.config import UserError
from jaxspec.drafters.lm import LMDrafterParams
from jaxspec.roofline import Work, busy, leaves
from jaxspec.timing import paced, slope
from jaxspec.transformer import LMConfig, empty_cache, extend, init, unembed
from tests import fleet

TIED = LMConfig(
    vocab_size=96, width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=64, max_positions=128,
    qkv_bias=True, qk_norm=True,
)  # fmt: skip
UNTIED = dataclasses.replace(TIED, tied=False, qkv_bias=False, qk_norm=False)
LOAD = Load(context=20, room=80, number=3, bucket=32)


def weight(tree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("rows, width, cached", [(1, 1, 9), (3, 4, 20)])
def test_a_window_reads_and_writes_what_its_arrays_weigh(config, dtype, rows, width, cached):
    params = init(config, jax.random.key(0), dtype)
    tokens = jnp.arange(rows * width).reshape(rows, width)
    looked_up = params["embed"]["embedding"][tokens]
    logits = unembed(config, params, looked_up)
    own = roofline.window(config, dtype, rows=rows, width=width, cached=cached)
    rest = {name: part for name, part in params.items() if config.tied or name != "embed"}
    embedding = 0 if config.tied else weight(looked_up)
    assert own.read == weight(rest) + embedding + weight(empty_cache(config, rows, cached, dtype))
    assert own.written == weight(empty_cache(config, rows, width, dtype)) + weight(logits)


def test_a_prompt_reads_no_head_and_a_local_layer_no_more_than_its_window():
    params, known = init(TIED, jax.random.key(0)), {"rows": 1, "width": 5, "scored": 0}
    rows = weight(params["embed"]["embedding"][:5])
    assert (
        roofline.window(TIED, jnp.float32, cached=0, **known).read
        == weight(params["layers"]) + weight(params["norm"]) + rows
    )
    local = dataclasses.replace(TIED, windows=(4, None))
    all_of, some_of = (roofline.window(config, jnp.float32, cached=40, **known) for config in (TIED, local))
    one_layer = weight(empty_cache(dataclasses.replace(TIED, num_layers=1), 1, 1))
    assert all_of.read - some_of.read == (40 - 3) * one_layer


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_xla_counts_the_same_operations_and_no_fewer_bytes(config):
    wide = dataclasses.replace(config, width=128, head_dim=32, mlp_width=384, vocab_size=512)
    rows, width, cached = 2, 4, 60
    params = init(wide, jax.random.key(0))
    cache = empty_cache(wide, rows, cached + width)

    def call(params, cache, tokens, start):
        hidden, cache = extend(wide, params, cache, tokens, start)
        return unembed(wide, params, hidden), cache

    arguments = params, cache, jnp.zeros((rows, width), jnp.int32), jnp.full(rows, cached, jnp.int32)
    counted = jax.jit(call).lower(*arguments).compile().cost_analysis()
    if not counted or "flops" not in counted:
        pytest.skip("this platform counts no operations")
    own = roofline.window(wide, jnp.float32, rows=rows, width=width, cached=cached)
    assert own.operations <= counted["flops"] <= 1.1 * own.operations
    assert own.bytes <= counted["bytes accessed"]


def test_every_token_drafted_is_a_call():
    of = lambda number: roofline.drafting(TIED, jnp.float32, rows=2, number=number, cached=20)
    params, column = init(TIED, jax.random.key(0)), weight(empty_cache(TIED, 2, 1))
    assert of(1).read == weight(params) + 18 * column
    assert of(3).read == 3 * weight(params) + (18 + 20 + 21) * column
    assert of(3).written == (2 + 1 + 1) * column + 3 * 2 * TIED.vocab_size * 4


def test_routes_add_what_their_weights_weigh():
    of = lambda bank, routes: roofline.updates(fleet.DRAFT, jnp.float32, bank, routes)
    base, bank = fleet.weights("gathered").drafter
    whole = fleet.weights("whole").drafter.bank
    kernels = lambda params: {
        (layer, name): blocks[block][name]["kernel"]
        for layer, blocks in params["layers"].items()
        for block, names in PROJECTIONS.items()
        for name in names
    }
    assert isinstance(whole, Whole) and of(None, 3) == 0
    assert of(bank, 3) == weight(bank) and of(bank, 1) == weight(bank) // 3
    assert of(whole, 4) == weight(whole) - weight(base)  # the base is the fourth
    assert of(Stacked(), 4) == weight(kernels(stack(base, bank))) - weight(kernels(base))


def test_the_floor_is_the_longer_of_moving_and_computing():
    work = roofline.together([Work(60, 20, 500), Work(15, 5, 500)])
    assert work == Work(75, 25, 1000) and work.bytes == 100
    assert roofline.floor(work, 10.0) == roofline.floor(work, 10.0, 1000.0) == 10.0
    assert roofline.floor(work, 10.0, 50.0) == 20.0


class Clock:
    """Time passes only while chains run: a start of five seconds, the steps, and now and then somebody else's second."""

    def __init__(self):
        self.now, self.calls = 0.0, []

    def __call__(self) -> float:
        return self.now

    def chain(self, cost: float):
        def run(steps: int) -> None:
            self.calls.append(steps)
            self.now += 5 + cost * steps + (1.0 if len(self.calls) % 5 == 0 else 0.0)

        return run


def test_a_step_is_timed_without_what_begins_and_ends_a_chain():
    clock = Clock()
    ways = {"short": clock.chain(0.25), "long": clock.chain(2.0)}
    found = paced(ways, seconds=40.0, passes=7, most={"long": 30}, clock=clock)
    assert found["short"].seconds == pytest.approx(0.25) and found["long"].seconds == pytest.approx(2.0)
    assert found["long"].fastest == pytest.approx(2.0)
    assert found["long"].steps == 10 and max(clock.calls) == 3 * found["short"].steps
    assert 40 / 0.25 / 2 < found["short"].steps < 2 * 40 / 0.25


def test_slopes_do_not_see_an_outlier():
    assert slope({4: [1.0, 9.0, 1.1], 12: [1.8, 1.9, 30.0]}) == pytest.approx((1.9 - 1.1) / 8)


def test_time_is_busy_once_however_many_lines_are():
    assert busy([[(0, 2), (5, 6)], [(1, 3), (5.5, 5.75)]]) == 4
    assert busy([]) == 0 and busy([[(3, 3)]]) == 0


def test_what_holds_others_did_not_run_itself():
    loop, inner = (0, 10), [(1, 2), (2, 4), (6, 6)]
    assert leaves([loop, *inner]) == inner
    assert leaves([(0, 3), (2, 5)]) == [(0, 3), (2, 5)]


def plane(name: str, lines: dict[str, list[tuple[int, int]]]):
    event = lambda begin, end: SimpleNamespace(start_ns=begin, duration_ns=end - begin)
    own = [SimpleNamespace(name=line, events=[event(*at) for at in events]) for line, events in lines.items()]
    return SimpleNamespace(name=name, lines=own)


def test_a_profile_is_read_by_its_devices_streams():
    streams = {"Stream #7(Compute)": [(0, 4), (6, 8)], "Stream #9(MemcpyD2D)": [(7, 9)], "XLA Modules": [(0, 9)]}
    found = device.ran([plane("/host:CPU", {"Stream": [(0, 100)]}), plane("/device:GPU:0", streams)])
    assert found == [[(0, 4), (6, 8)], [(7, 9)]] and busy(found) == 7
    assert device.ran([plane("/device:TPU:0", {"XLA Ops": [(0, 9), (1, 2), (3, 4)]})]) == [[(1, 2), (3, 4)]]
    with pytest.raises(NotMeasured, match=r"no events .*it has /device:GPU:0/Other"):
        device.ran([plane("/host:CPU", {}), plane("/device:GPU:0", {"Other": [(0, 1)]})])


def test_launches_of_a_step_leave_out_those_of_the_call(monkeypatch):
    profile = lambda run, steps: (7 + 30 * steps, 100.0 + 6 * steps, 900.0 + 8 * steps)
    monkeypatch.setattr(device, "_profiled", profile)
    found = device.launches(lambda steps: None, 4, 12)
    assert found.number == 30 and found.between == pytest.approx(0.25)


def test_a_cpu_has_a_profile_and_no_kernels():
    run = lambda steps: jax.block_until_ready(jnp.ones(8) * steps)
    with pytest.raises(NotMeasured, match=r"no events on lines named Stream or XLA Ops; it has .*host"):
        device.launches(run, 1, 3)


def test_a_slow_h200_voids_the_run():
    assert device.is_void("NVIDIA H200", 4.1e12) and not device.is_void("NVIDIA H200", 4.3e12)
    assert not device.is_void("NVIDIA H100 80GB HBM3", 2.5e12)


def test_bandwidth_is_of_the_array_asked_for():
    found = device.bandwidth(1 << 20, passes=1, seconds=0.01)
    assert found.size == 1 << 20 and found.best == max(found.read, found.copy) > 0


@pytest.fixture(scope="module")
def subject() -> Subject:
    """A target that drafts for itself, in two slots."""
    params = fleet.weights("none").target
    drafter = Drafting(LMDrafterParams(params), (-1, -1))
    return Subject(fleet.TARGET, fleet.TARGET, jnp.dtype("float32"), 2, params, params, {"base": drafter})


def test_a_chain_says_what_single_calls_say(subject):
    chain = chains.scoring(subject.shape, subject.dtype, subject.target, 2, 3, LOAD)
    cache, window = empty_cache(subject.shape, 2, LOAD.room), jnp.ones((2, 3), jnp.int32)
    seen = []
    for _ in range(4):
        hidden, cache = extend(subject.shape, subject.target, cache, window, jnp.full(2, LOAD.context))
        window = jnp.argmax(unembed(subject.shape, subject.target, hidden), -1).astype(jnp.int32)
        seen.append(window)
    assert (np.asarray(chain.run(4)) == seen[-1]).all() and (np.asarray(chain.run(2)) == seen[1]).all()
    assert not (seen[1] == seen[-1]).all()


@pytest.mark.parametrize("sampling", [{}, chains.SAMPLED], ids=["greedy", "top-k and top-p"])
def test_iterations_of_a_perfect_drafter_accept_all(subject, sampling):
    chain = chains.iterations(subject, subject.drafters["base"], LOAD, sampling)
    assert chain.most == LOAD.budget // 4
    for rounds in (1, chain.most):
        assert (np.asarray(chain.run(rounds)) == LOAD.context + 4 * rounds).all()


def test_the_command_has_a_row_a_program(pool, tmp_path, capsys):
    out = tmp_path / "roofline.json"
    small = {"context": 20, "room": 64, "prompt": 20, "widths": (2,), "passes": 1, "seconds": 0.005}
    given = {"bandwidth": 1e10, "peak": 1e11}
    command.run(Roofline(pool=pool, slots=(3,), num_speculative_tokens=1, output=str(out), **small, **given))
    found = json.loads(out.read_text())
    rows = {row["program"]: row for row in found["programs"]}
    alone = ["target, 1 wide", "target, 2 wide", "drafter step", "prefill, 1 x 32 tokens", "target and drafter, K = 1"]
    whole = ["nothing drafted", "one merged", "3 routes", "one merged, top-k and top-p"]
    rest = ["drafter step within an iteration", "outside target and drafter"]
    rest += ["outside target and drafter, top-k and top-p"]
    assert list(rows) == [*alone, *(f"iteration, {name}" for name in whole), *rest]
    assert rows["iteration, 3 routes"]["bytes"] > rows["iteration, one merged"]["bytes"]
    for row in (rows[name] for name in rows.keys() - rest):
        assert row["floor"] == pytest.approx(max(row["bytes"] / 1e10, row["operations"] / 1e11))
        assert row["ratio"] == pytest.approx(row["seconds"] / row["floor"]) and row["steps"] > 0
    calls, iteration = (rows[name]["seconds"] for name in ("target and drafter, K = 1", "iteration, one merged"))
    assert rows["outside target and drafter"]["seconds"] == pytest.approx(iteration - calls)
    within = rows["drafter step within an iteration"]["seconds"]
    assert within == pytest.approx(iteration - rows["target, 2 wide"]["seconds"])
    assert not found["void"] and found["bandwidth"] == 1e10 and found["dtype"] == "float32"
    assert found["device"] and found["versions"]["jax"] == jax.__version__
    last = capsys.readouterr().out.rstrip().splitlines()[-len(rows) :]
    assert all(line.count("|") == len(command.COLUMNS) + 1 for line in last)


def test_one_slot_drafts_with_merged_weights_and_shapes_need_no_pool(pool, world):
    _, measured = subjects(Roofline(pool=pool, slots=(1,)))
    (own,) = measured
    assert [(name, drafting.routes) for name, drafting in own.drafters.items()] == [("base", (-1,)), ("merged", (0,))]
    load, measured = subjects(Roofline(shapes=(str(world.target), str(world.draft)), slots=(1, 2)))
    assert load == Load(context=128, room=512, number=4, bucket=128)
    assert [(own.slots, own.dtype, list(own.drafters)) for own in measured] == [
        (n, jnp.bfloat16, ["base"]) for n in (1, 2)
    ]


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({}, "give either a pool or two shapes"),
        ({"shapes": ("JackFram/llama-68m",)}, "must be two"),
        ({"shapes": ("llama", "JackFram/llama-68m")}, "'llama' is neither a model folder nor one of"),
        ({"room": 130}, "--room 130 does not hold 128 cached tokens .* give at least 160"),
        ({"room": 250, "widths": (200,)}, "give at least 328"),
        ({"num_speculative_tokens": 17}, "num_speculative_tokens 17"),
        ({"output": "nowhere/there.json"}, "its folder does not exist"),
    ],
)
def test_mistakes_are_told(settings, sentence):
    pair = {} if not settings else {"shapes": ("JackFram/llama-68m", "JackFram/llama-68m")}
    with pytest.raises(UserError, match=sentence):
        command.run(Roofline(**(pair | settings)))
