"""Laws of where training data comes from: who writes a text, what the target says of it, and that each is worth learning."""

import dataclasses
import json
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from conftest import DRAFT, EOS, TARGET, make_tokenizer, random_params
from test_resume import interrupt_call

from jaxspec import align, forced, sharding
from jaxspec import training as loop
from jaxspec.config import Experiment, Mesh, Partition, UserError
from jaxspec.packing import as_batch, packed_rows
from jaxspec.store.huggingface import write_model
from jaxspec.store.models import Pair, read_pair
from jaxspec.store.traces import Texts, Traces, read_traces, split_of
from jaxspec.transformer import forward, unembed
from jaxspec.writing import Writer
from train import align as stage
from train import partition, trace

NEAR = 1e-3  # of a logit that is scaled by 20: sums of at most 48 terms in another order, through two layers
ROWS, ROW_TOKENS, ROOM = 4, 64, 48


class Log(NamedTuple):
    """A pair, the trace of its log, and what answers the log's prompts greedily or by sampling."""

    pair: Pair
    traces: Traces
    greedy: Writer
    sampled: Writer


@pytest.fixture(scope="module")
def answered(experiment, tmp_path_factory) -> Experiment:
    """The log, in which every third line has a response, and a pair with something to learn; `out` is still to be given."""
    folder = tmp_path_factory.mktemp("answered")
    for number, (name, config) in enumerate((("target", TARGET), ("draft", DRAFT))):
        params = random_params(config, number, 3.0)
        sharp = params | {"norm": {"scale": 20 * params["norm"]["scale"]}}
        write_model(folder / name, config, sharp, extra={"eos_token_id": EOS})
        make_tokenizer().save_pretrained(folder / name)
    lines = [line for own in sorted(Path(experiment.prompts).iterdir()) for line in own.read_text().splitlines()]
    say = lambda n: {"response": "hoist the sugar before noon"} if n % 3 == 0 else {}
    text = "".join(json.dumps(json.loads(line) | say(n)) + "\n" for n, line in enumerate(lines))
    (folder / "log.jsonl").write_text(text)
    paths = {name: str(folder / name) for name in ("target", "draft")}
    return dataclasses.replace(experiment, **paths, prompts=str(folder / "log.jsonl"))


@pytest.fixture(scope="module")
def runs(answered, tmp_path_factory) -> dict[str, Experiment]:
    """Finished traces whose texts come from everywhere."""
    found = {}
    for texts in ("log", "target", "draft", "mix"):
        own = dataclasses.replace(answered.trace, texts=texts)
        found[texts] = dataclasses.replace(answered, out=str(tmp_path_factory.mktemp(texts)), trace=own)
        trace.run(found[texts])
    return found


@pytest.fixture(scope="module")
def sources(runs) -> dict[str, Traces]:
    return {texts: read_traces(own.out) for texts, own in runs.items()}


@pytest.fixture(scope="module")
def log(answered, sources) -> Log:
    pair, traces = read_pair(answered.target, answered.draft, "float32"), sources["target"]
    return Log(pair, traces, *(Writer(pair, traces, temperature=t, rows=8) for t in (0.0, 0.8)))


def other_weights(pair: Pair) -> dict:
    """A drafter to which tokens beyond the target's vocabulary seem by far the likeliest."""
    table = pair.draft.params["embed"]["embedding"]
    return pair.draft.params | {"embed": {"embedding": table.at[pair.vocab_size :].multiply(40.0)}}


@cache
def target_log_p(config):
    return jax.jit(lambda params, row: jax.nn.log_softmax(unembed(config, params, forward(config, params, row)), -1))


def along(config, params, tokens: np.ndarray) -> np.ndarray:
    """Log-probabilities after every token of one text, read alone."""
    row = np.zeros((1, 160), np.int32)
    row[0, : len(tokens)] = tokens
    return np.asarray(target_log_p(config)(params, row))[0, : len(tokens)]


def test_greedy_texts_are_what_the_drafter_would_say_next(log):
    """Of two drafters through one program, whose vocabulary is padded beyond the target's."""
    examples = [3, 17, 4, 40, 21, 9, 30, 33, 50, 12]
    pair = log.pair
    for weights in (pair.draft.params, other_weights(pair)):
        texts = log.greedy.texts(weights, examples, seed=0)
        for i, own, length in zip(examples, texts.tokens, texts.prompt_length, strict=True):
            stored = log.traces.tokens[i]
            assert own[:length].tolist() == stored[: log.traces.prompt_length[i]].tolist()
            assert length < len(own) <= len(stored)
            assert len(own) == len(stored) or own[-1] in pair.stop_tokens
            assert not set(own[length:-1]) & set(pair.stop_tokens) and own.max() < pair.vocab_size
            log_q = along(pair.draft.config, weights, own)[length - 1 : -1, : pair.vocab_size]
            assert (log_q.max(-1) - np.take_along_axis(log_q, own[length:, None], 1)[:, 0] < NEAR).all()
    assert log.greedy._author._write._cache_size() == log.greedy._score._cache_size() == 1


def test_what_is_kept_of_a_text_is_the_targets_own_word(log):
    texts = log.sampled.texts(log.pair.draft.params, range(10), seed=1)
    for n, (own, length) in enumerate(zip(texts.tokens, texts.prompt_length, strict=True)):
        log_p = along(log.pair.target.config, log.pair.target.params, own)[length - 1 : -1]
        places = range(len(own) - length)
        ids, kept, tail = (leaf[n, places] for leaf in (texts.top_ids, texts.top_log_p, texts.tail_log_p))
        np.testing.assert_allclose(np.take_along_axis(log_p, ids, 1), kept, atol=NEAR)
        np.testing.assert_allclose(kept[:, 0], log_p.max(-1), atol=NEAR)
        assert all(len(set(row)) == len(row) for row in ids.tolist())
        np.testing.assert_allclose(np.exp(kept).sum(-1) + np.exp(tail), 1.0, atol=NEAR)


def test_a_seed_names_the_texts_whoever_is_written_beside_them(log):
    write = partial(log.sampled.texts, log.pair.draft.params)
    say = lambda texts: [own.tolist() for own in texts.tokens]
    first = say(write(range(12), seed=1))
    assert say(write([5, 2, 11], seed=1)) == [first[5], first[2], first[11]]
    assert say(write(range(12), seed=2)) != first


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_drafter_that_says_what_is_stored_trains_on_what_is_stored(log, share):
    """Whatever the plan of rows, each drafter's own texts stand where the stored ones stood."""
    traces, asked = log.traces, []
    spec = dataclasses.replace(Experiment().align, rows=ROWS, row_tokens=ROW_TOKENS, refresh=2, on_policy=share)
    lengths = [len(own) for own in traces.tokens]
    plans = [packed_rows(lengths, np.arange(d, 60, 2), 5 * ROWS, ROW_TOKENS, seed=d) for d in range(2)]
    course = loop.Course("bank", None, (), (), plans, [], 5, ())  # pyright: ignore[reportArgumentType]

    def stored(frozen, params, drafter, examples, step) -> Texts:
        asked.append((drafter, step, params))
        pick = lambda leaf: leaf[np.array(examples)]
        kept = (traces.prompt_length, traces.top_ids, traces.top_log_p, traces.tail_log_p)
        return Texts([traces.tokens[i] for i in examples], *map(pick, kept))

    feed = loop._feeding(spec, traces, course, ROOM, sharding.make_mesh(1, 1), stored)
    for step in range(5):
        batch = feed(step, f"params {step}")
        expected = [as_batch(traces, plan[step * ROWS : (step + 1) * ROWS], ROW_TOKENS, ROOM) for plan in plans]
        jax.tree.map(lambda own, *each: np.testing.assert_array_equal(own, np.stack(each)), batch, *expected)
    assert asked == [(d, step, f"params {step}") for step in (0, 2, 4) for d in (0, 1)]


def test_a_specialist_that_replays_has_rows_of_any_task_in_every_step():
    spec = dataclasses.replace(Experiment().align, rows=4, replay=0.25)
    own, union = [[i] for i in range(12)], [[100 + i] for i in range(20)]
    assert stage._replayed(spec, own, union) == [union[i] if i % 4 == 0 else own[i] for i in range(12)]
    assert stage._replayed(dataclasses.replace(spec, replay=0.0), own, union) == own


def test_who_writes_a_text_is_as_asked_and_the_drafter_writes_nothing_that_is_measured(sources, log):
    outputs = {name: [own.tolist() for own in traces.outputs()] for name, traces in sources.items()}
    response = outputs["log"][0]
    drafted = [own[n:].tolist() for own, n in zip(*log.greedy.texts(log.pair.draft.params, range(60), 0)[:2])]
    held = split_of(60, 0) > 0
    for i in range(60):
        target = outputs["target"][i]
        assert outputs["log"][i] == (response if i % 3 == 0 else target) and response != target
        said, mixed = outputs["draft"][i], outputs["mix"][i]
        if held[i]:
            assert said == mixed == target
            assert sources["mix"].drafted[i] == sources["draft"].drafted[i] == sources["target"].drafted[i] > 0
        else:
            # The trace's budget is 12 tokens, the writer's the length of the target's answer.
            assert said[: len(drafted[i])] == drafted[i] and mixed in (response, target, said)
            assert sources["draft"].drafted[i] == sources["draft"].accepted[i] == 0
    found = [outputs[name][i] for name in ("log", "target", "draft") for i in (0, 1) if not held[i]]
    assert len({tuple(own) for own in found}) > 2 and len({tuple(own) for own in outputs["mix"][:12]}) > 2
    for name, traces in sources.items():
        kinds = sum(mixed in (response,) for mixed in outputs[name])
        assert (kinds > 0) == (name in ("log", "mix"))
        own = along(log.pair.target.config, log.pair.target.params, traces.tokens[1])[traces.prompt_length[1] - 1 : -1]
        np.testing.assert_allclose(traces.top_log_p[1, : len(own), 0], own.max(-1), atol=NEAR)


@pytest.fixture(scope="module")
def training(log):
    """A jitted step of a full fine-tune of the drafter, and sums over the target's texts of the held split."""
    pair = log.pair
    log_q = lambda frozen, *own: forced.log_q(pair.draft.config, own[0], None, *own[1:], pair.vocab_size)
    make = lambda name: align.aligner(log_q, align.LOSSES[name], align.optimiser())
    rows = packed_rows([len(own) for own in log.traces.tokens], np.flatnonzero(split_of(60, 0)), 8, ROW_TOKENS, 0)
    held = as_batch(log.traces, rows, ROW_TOKENS, ROOM)
    judge = jax.jit(make("total_variation").evaluate)
    own = make("forward_kl")
    return own.init(pair.draft.params), jax.jit(own.step), lambda params: jax.device_get(judge((), params, held))


@pytest.mark.parametrize("source", ["log", "target", "draft", "mix", "on-policy"])
def test_every_source_of_texts_raises_acceptance_on_the_targets(sources, log, training, source):
    state, step, judge = training
    (rejected, agreed, places), steps, refresh = judge(state.params), 80, 20
    traces: Traces | Texts = sources.get(source, log.traces)
    examples = np.flatnonzero(split_of(60, 0) == 0)
    for number in range(steps):
        if number % refresh == 0 and source == "on-policy":
            traces = log.greedy.texts(state.params, range(60), seed=number)
        if number % refresh == 0:
            rows = packed_rows([len(own) for own in traces.tokens], examples, refresh * ROWS, ROW_TOKENS, number)
        batch = as_batch(traces, rows[number % refresh * ROWS :][:ROWS], ROW_TOKENS, ROOM)
        state, _ = step((), state, batch, 3e-3)
    found = judge(state.params)
    assert found[0] < 0.8 * rejected and found[1] > agreed + 0.1 * places


@pytest.mark.parametrize("texts", ["draft", "mix"])
def test_another_seed_would_measure_on_what_the_drafter_wrote(runs, texts):
    with pytest.raises(UserError, match=r"--seed 5 .* give --seed 0$"):
        partition.run(dataclasses.replace(runs[texts], seed=5))


def test_a_killed_run_on_its_own_policy_goes_on_to_the_same_weights(runs, monkeypatch, tmp_path):
    """Killed between two times that the drafters speak, whose texts nobody stored."""
    own = dataclasses.replace(runs["target"], partition=Partition(num_clusters=2))
    partition.run(own)
    spec = dataclasses.replace(
        own.align, on_policy=0.5, refresh=2, replay=0.5, accumulate=2, trunk=0.0, mixed=("lora",), steps=6,
        checkpoint_every=4,
    )  # fmt: skip
    outs = [tmp_path / name for name in ("killed", "whole")]
    for out in outs:
        out.mkdir()
        for name in ("trace", "partition"):
            (out / name).symlink_to(Path(own.out, name))
    asked = [dataclasses.replace(own, align=spec, out=str(out)) for out in outs]
    with monkeypatch.context() as patch:
        interrupt_call(patch, loop, "schedule", 5)
        with pytest.raises(KeyboardInterrupt):
            stage.run(asked[0])
    with monkeypatch.context() as patch:
        calls = interrupt_call(patch, loop, "schedule", -1)
        stage.run(asked[0])
    assert calls[0][0] == 4
    stage.run(asked[1])
    weights = [[(out / "align" / f"{name}.safetensors").read_bytes() for name in ("bank", "mixed")] for out in outs]
    assert weights[0] == weights[1]


def test_selection_has_each_drafter_but_the_trunk_trained_twice(experiment, monkeypatch):
    """From the same start, at the rate that the first run found, with what it learnt as the reference."""
    calls = []

    def train(spec, traces, course, *, reference=None, **places):
        calls.append((course.name, course.rates, course.params, reference))
        return {"params": f"{course.name} trained", "learning_rate": 0.5}

    monkeypatch.setattr(loop, "_train", train)
    course = loop.Course("bank", None, (), "start", [], [], 5, (0.5, 0.1))  # pyright: ignore[reportArgumentType]
    select = lambda share, own: loop.trained(
        dataclasses.replace(experiment.align, select=share),
        None,
        own,
        None,
        None,
        None,
    )  # pyright: ignore[reportArgumentType]
    assert select(0.4, course)["params"] == "bank trained"
    first, second = ("bank_reference", (0.5, 0.1), "start", None), ("bank", (0.5,), "start", "bank_reference trained")
    assert calls == [first, second]
    select(1.0, course), select(0.4, course._replace(name="trunk", falls=False))
    assert calls[2:] == [("bank", (0.5, 0.1), "start", None), ("trunk", (0.5, 0.1), "start", None)]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"accumulate": 3}, "--align.accumulate 3 does not divide --align.rows 2; give"),
        ({"on_policy": 0.1}, "--align.on-policy 0.1 of --align.rows 2 is no row; give 0.5 or more"),
        ({"replay": 0.2}, "--align.replay 0.2 of --align.rows 2 is no row; give 0.5 or more"),
        ({"temperature": 0.0}, "--align.temperature 0.0 leaves nothing to compare; give a number above 0"),
        ({"beta": 1.0}, "--align.beta 1.0 mixes nothing"),
        ({"select": 0.0}, "--align.select 0.0 leaves no token"),
        ({"on_policy": 0.5, "refresh": 50}, "--align.refresh 50 does not divide --align.checkpoint-every 2"),
    ],
)
def test_settings_that_do_not_belong_together_are_refused(experiment, changes, said):
    own = dataclasses.replace(experiment, align=dataclasses.replace(experiment.align, **changes))
    with pytest.raises(UserError, match=said):
        stage.check(own, sharding.make_mesh(1, 1))


def test_parts_that_a_mesh_does_not_divide_are_refused(experiment):
    own = dataclasses.replace(experiment, align=dataclasses.replace(experiment.align, accumulate=2), mesh=Mesh(data=2))
    with pytest.raises(
        UserError, match=r"--align.rows over --align.accumulate, of 1 does not divide over --mesh.data 2"
    ):
        stage.check(own, sharding.make_mesh(2, 1))


def test_a_run_on_several_hosts_has_no_target_to_ask(experiment):
    spec = dataclasses.replace(experiment.align, on_policy=0.5, refresh=2)
    with pytest.raises(UserError, match=r"--align.on-policy .* leave --distributed out"):
        stage.check(dataclasses.replace(experiment, align=spec, distributed=True), sharding.make_mesh(1, 1))
