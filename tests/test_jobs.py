"""A batch job is hard to lose work in: cut off anywhere and given again, it answers every prompt exactly once."""

import dataclasses
import functools
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
from pathlib import Path

import conftest
import jax
import jax.numpy as jnp
import pytest

from decode import answers, generate
from jaxspec import pooled
from jaxspec.config import UserError, command_line
from jaxspec.store.loading import load_pool
from jaxspec.store.names import extra_file
from jaxspec.store.trees import write_tree
from jaxspec.text import drafter_named

ORDERS = ("input", "completed")


def call(*argv):
    command_line(generate.Generate, generate.run, argv=[str(word) for word in argv])


@pytest.fixture(scope="module", autouse=True)
def in_memory(loaded):
    """Jobs take the pool that was read already, and the engine that an equal job has compiled."""
    with pytest.MonkeyPatch.context() as patch:
        for kind in ("speculative", "online"):
            patch.setattr(pooled, kind, functools.cache(getattr(pooled, kind)))
        patch.setattr(generate, "load_pool", lambda *paths, **places: loaded)
        yield


@pytest.fixture(scope="module")
def jobs(in_memory, pool, world, tmp_path_factory):
    """A generate command without its output, and what it writes when nothing disturbs it, in both orders."""
    folder = tmp_path_factory.mktemp("job")
    draw = random.Random(1)
    with open(folder / "in.jsonl", "w") as file:
        for name in sorted(world.prompts.iterdir()):
            for line in name.read_text().splitlines()[:8]:
                own = {"max_new_tokens": draw.randint(1, 14), "temperature": draw.choice((0, 0.7))}
                own |= {"stop": "e"} if draw.random() < 0.3 else {}
                file.write(json.dumps(json.loads(line) | own) + "\n")
    command = ["--pool", pool, "--input", folder / "in.jsonl", "--batch", 3]
    whole = {}
    for order in ORDERS:
        call(*command, "--order", order, "--output", folder / f"{order}.jsonl")
        whole[order] = (folder / f"{order}.jsonl").read_bytes()
    return command, whole


def assert_same(order: str, output: Path, whole: dict):
    """Byte-identical in the order of the prompts; as they are completed, the same set of lines."""
    ours, theirs = output.read_bytes(), whole[order]
    if order == "completed":
        ours, theirs = sorted(ours.split(b"\n")), sorted(theirs.split(b"\n"))
    assert ours == theirs


# What is written


def test_both_orders_hold_the_same_records_and_one_is_the_prompts(jobs):
    command, whole = jobs
    ids = [json.loads(line)["id"] for line in Path(command[3]).read_text().splitlines()]
    assert [json.loads(line)["id"] for line in whole["input"].splitlines()] == ids
    assert sorted(whole["input"].splitlines()) == sorted(whole["completed"].splitlines())
    assert whole["input"] != whole["completed"]


def test_records_hold_no_times(jobs):
    for line in jobs[1]["input"].splitlines():
        assert json.loads(line).keys() == {
            "id", "text", "token_ids", "finish_reason", "task", "drafter", "route_confidence", "num_drafts",
            "num_draft_tokens", "num_accepted_tokens",
        }  # fmt: skip


@pytest.mark.parametrize("settings", [{"--batch": 1}, {"--batch": 5}, {"--batch": 4, "--admit-rows": 3}])
def test_records_do_not_depend_on_the_batch(jobs, tmp_path, settings):
    command, whole = jobs
    call(*command, *(word for pair in settings.items() for word in pair), "--output", tmp_path / "out.jsonl")
    assert_same("input", tmp_path / "out.jsonl", whole)


def test_named_prompts_in_another_order_have_the_same_records(jobs, tmp_path):
    command, whole = jobs
    lines = Path(command[3]).read_text().splitlines()
    random.Random(0).shuffle(lines)
    (tmp_path / "shuffled.jsonl").write_text("\n".join(lines) + "\n")
    call(*command[:3], tmp_path / "shuffled.jsonl", *command[4:], "--output", tmp_path / "out.jsonl")
    assert sorted((tmp_path / "out.jsonl").read_bytes().splitlines()) == sorted(whole["input"].splitlines())


def test_explain_prints_programs_shapes_and_seconds(jobs, tmp_path, capsys):
    call(*jobs[0], "--output", tmp_path / "out.jsonl", "--explain")
    said = capsys.readouterr().out
    assert re.search(r"^[34] programs for 3 slots of \d+ tokens:$", said, re.M)
    assert len(re.findall(r"^  (?:prefill|admit|chunk|halt) .* s$", said, re.M)) in (
        3,
        4,
    )  # the host may have ended rows
    for name, shape in (("prefill", "1 x 32"), ("admit", "1 x 32"), ("chunk", r"3 x \d+")):
        assert re.search(rf"^  {name} +{shape} tokens +\d+\.\d\d s$", said, re.M)


# Cut off and given again


@pytest.mark.parametrize("share", [0.0, 0.03, 0.4, 0.71, 1.0])
@pytest.mark.parametrize("order", ORDERS)
def test_wherever_a_job_was_cut_off_it_ends_the_same(jobs, order, share, tmp_path):
    command, whole = jobs
    output = tmp_path / "out.jsonl"
    output.write_bytes(whole[order][: int(share * len(whole[order]))])
    call(*command, "--order", order, "--output", output)
    assert_same(order, output, whole)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("--seed", "5"), "seed 0, now it is 5"),
        (("--temperature", "0.25"), "temperature 0.0, now it is 0.25"),
        (("--order", "completed"), "order 'input', now it is 'completed'"),
        (("--logprobs",), "logprobs False, now it is True"),
    ],
)
def test_a_job_does_not_go_on_with_other_settings(jobs, change, said, tmp_path, capsys):
    command, whole = jobs
    output = tmp_path / "out.jsonl"
    call(*command, "--output", output)
    half = whole["input"][: len(whole["input"]) // 2]
    output.write_bytes(half)
    with pytest.raises(SystemExit) as end:
        call(*command, "--output", output, *change)
    assert end.value.code == 2 and said in capsys.readouterr().err
    assert output.read_bytes() == half
    call(*command, "--output", output)
    assert_same("input", output, whole)


@pytest.mark.parametrize("order", ORDERS)
def test_what_is_written_already_is_not_decoded_again(jobs, order, tmp_path, monkeypatch):
    command, whole = jobs
    output, kept = tmp_path / "out.jsonl", whole[order].splitlines(keepends=True)[:15]
    output.write_bytes(b"".join(kept) + b'{"id": "torn')
    real, asked = answers.serve, []
    monkeypatch.setattr(answers, "serve", lambda *parts, **own: asked.extend(parts[3]) or real(*parts, **own))
    call(*command, "--order", order, "--output", output)
    assert len(asked) == whole[order].count(b"\n") - 15
    assert output.read_bytes().startswith(b"".join(kept))
    assert_same(order, output, whole)


class Watched(io.FileIO):
    """The output of a process that is killed or noticed while it writes."""

    def write(self, data) -> int:
        return super().write(self.before(data))


@pytest.mark.parametrize("order", ORDERS)
def test_a_record_is_written_as_soon_as_its_turn_has_come(jobs, order, tmp_path, monkeypatch):
    real, seen, at_write = answers.serve, [], []

    def watched(*parts, **settings):
        for piece in real(*parts, **settings):
            seen.extend([piece.index] * (piece.completion is not None))
            yield piece

    monkeypatch.setattr(answers, "serve", watched)
    monkeypatch.setattr(generate, "open", Watched, raising=False)
    monkeypatch.setattr(Watched, "before", lambda file, data: at_write.append(len(seen)) or data, raising=False)
    call(*jobs[0], "--order", order, "--output", tmp_path / "out.jsonl")
    completed = [seen.index(number) + 1 for number in range(len(seen))]
    assert at_write == list(itertools.accumulate(completed, max) if order == "input" else sorted(completed))


def _die(argv: list[str], left: int):
    """Is killed when so many bytes are on the disk, inside a record or between two."""
    written = 0

    def before(file, data):
        nonlocal written
        if written + len(data) > left:
            io.FileIO.write(file, data[: left - written])
            os.kill(os.getpid(), signal.SIGKILL)
        written += len(data)
        return data

    Watched.before, generate.open = before, Watched
    call(*argv)


def _get_notice(argv: list[str], record: int, said: str):
    """Receives SIGTERM while it writes a record, as the jobs of a preempted machine do."""
    numbers = itertools.count(1)

    def before(file, data):
        if next(numbers) == record:
            os.kill(os.getpid(), signal.SIGTERM)
        return data

    sys.stderr = open(said, "w")
    Watched.before, generate.open = before, Watched
    call(*argv)


def exit_code(target, *args) -> int:
    """Runs `target` in a process of its own, forked from one that has imported everything and done nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["decode.generate"])
    process = context.Process(target=target, args=args)
    process.start()
    process.join(300)
    return process.exitcode


@pytest.mark.parametrize(
    ("seed", "order"),
    [
        pytest.param(seed, order, marks=() if seed == 2 and seed % 2 == number else pytest.mark.slow)
        for seed in range(20)
        for number, order in enumerate(ORDERS)
    ],
)
def test_a_job_killed_at_any_byte_answers_every_prompt_once(jobs, order, seed, tmp_path):
    """Seeds of one half kill it between two records, the others anywhere; every fifth is killed twice."""
    command, whole = jobs
    output, draw = tmp_path / "out.jsonl", random.Random(seed)
    sizes = [len(line) for line in whole[order].splitlines(keepends=True)]
    argv = [str(word) for word in (*command, "--order", order, "--output", output)]
    for _ in range(1 + (seed % 5 == 0)):
        after = sum(sizes[: draw.randrange(12)]) if seed // 2 % 2 == 0 else draw.randrange(sum(sizes) // 2)
        before = output.read_bytes().rpartition(b"\n")[0] if output.exists() else b""
        assert exit_code(_die, argv, after) == -signal.SIGKILL
        assert len(output.read_bytes()) == len(before) + bool(before) + after
    call(*argv)
    assert_same(order, output, whole)


@pytest.mark.parametrize("order", ["input", pytest.param("completed", marks=pytest.mark.slow)])
def test_a_notice_of_preemption_keeps_what_was_answered(jobs, order, tmp_path):
    command, whole = jobs
    output, said = tmp_path / "out.jsonl", tmp_path / "said"
    argv = [str(word) for word in (*command, "--order", order, "--output", output)]
    assert exit_code(_get_notice, argv, 8, str(said)) == 128 + signal.SIGTERM
    assert said.read_text().splitlines()[-1] == (
        "preempted: 8 of 24 prompts answered; run the same command again to go on"
    )
    assert output.read_bytes().count(b"\n") == 8 and output.read_bytes().endswith(b"\n")
    call(*argv)
    assert_same(order, output, whole)


def test_a_job_leaves_the_handler_of_signals_as_it_was(jobs, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    call(*jobs[0], "--output", tmp_path / "out.jsonl")
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("order", ORDERS)
def test_a_job_on_a_full_disk_goes_on_later(jobs, order, tmp_path, capsys):
    command, whole = jobs
    output, room = tmp_path / "out.jsonl", int(0.6 * len(whole[order]))
    with conftest.small_files(room), pytest.raises(SystemExit) as left:
        call(*command, "--order", order, "--output", output)
    assert left.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "File too large" in last and "run the same command again" in last
    assert 0 < output.stat().st_size <= room
    call(*command, "--order", order, "--output", output)
    assert_same(order, output, whole)


# Prompts that fail


FAULTS = {
    "too long": (b'{"id": "too long", "prompt": "' + b"bake " * 149 + b'"}', "longer than 148"),
    "empty": (b'{"id": "empty", "prompt": " "}', "the prompt is empty"),
    "refused": (b'{"id": "refused", "messages": [{"role": "system", "content": "x"}]}', "(no system)"),
    "not JSON": (b'{"id": "x", "prompt": stir}', "not JSON"),
    "not UTF-8": (b'{"id": "x", "prompt": "sti\xff"}', "utf-8"),
    "half a character": (b'{"id": "x", "prompt": "\\ud83e"}', "surrogates"),
    "half a character as id": (b'{"id": "\\ud83e", "prompt": "stir"}', "surrogates"),
    "nested without end": (b'{"id": "x", "prompt": ' + b"[" * 200_000, "recursion"),
    "no object": (b'"stir"', "neither"),
}
NAMED = ("too long", "empty", "refused")  # whose id can be read
GOOD = [b'{"id": "a", "prompt": "stir the soup"}', b'{"id": "b", "prompt": "hoist our anchor"}']


def job_of(folder: Path, pool: str, *lines: bytes) -> list:
    (folder / "in.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return ["--pool", pool, "--input", folder / "in.jsonl", "--max-new-tokens", 12, "--batch", 3]


def failed(capsys, command) -> str:
    """The sentence in which a job says what it could not do."""
    with pytest.raises(SystemExit) as left:
        call(*command)
    assert left.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.fixture(scope="module")
def good(in_memory, pool, tmp_path_factory) -> list[bytes]:
    """The records of the prompts that can be answered."""
    folder = tmp_path_factory.mktemp("good")
    call(*job_of(folder, pool, *GOOD), "--output", folder / "out.jsonl")
    return (folder / "out.jsonl").read_bytes().splitlines()


@pytest.mark.parametrize("order", ORDERS)
def test_a_prompt_that_fails_becomes_a_record_and_the_others_are_answered(pool, good, order, tmp_path, capsys):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    faults = [line for line, _ in FAULTS.values()]
    command = [*job_of(tmp_path, pool, GOOD[0], *faults, GOOD[1]), "--order", order, "--output", output]
    summary = f"error: {len(FAULTS)} prompts were not answered, the first at {source}, line 2: prompt of"
    assert failed(capsys, command).startswith(summary)
    records = output.read_bytes().splitlines()
    assert sorted(own for own in records if b'"error"' not in own) == sorted(good)
    found = {own["id"]: own["error"] for own in map(json.loads, records) if "error" in own}
    assert len(records) == len(found) + 2
    for number, (name, (_, reason)) in enumerate(FAULTS.items(), 2):
        assert reason in found[name if name in NAMED else f"{source}, line {number}"]
    # Asked again there is nothing to do, and what was not answered is said again.
    assert failed(capsys, command).startswith(summary)
    assert output.read_bytes().splitlines() == records


@pytest.mark.parametrize("kept", range(0, 12, 3))
def test_a_job_with_faults_is_cut_off_too(pool, kept, tmp_path, capsys):
    faults = [line for line, _ in FAULTS.values()]
    command = job_of(tmp_path, pool, *faults[:4], GOOD[0], *faults[4:], GOOD[1])
    failed(capsys, [*command, "--output", tmp_path / "whole.jsonl"])
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "out.jsonl").write_bytes(b"".join(lines[:kept]))
    failed(capsys, [*command, "--output", tmp_path / "out.jsonl"])
    assert (tmp_path / "out.jsonl").read_bytes() == b"".join(lines)


def test_a_job_of_faults_alone_ends(pool, tmp_path, capsys):
    lines = [line for line, _ in FAULTS.values()]
    last = failed(capsys, [*job_of(tmp_path, pool, *lines), "--output", tmp_path / "out.jsonl"])
    assert last.startswith(f"error: {len(lines)} prompts were not answered, the first at")
    assert all("error" in json.loads(own) for own in (tmp_path / "out.jsonl").read_text().splitlines())


@pytest.mark.parametrize("order", ORDERS)
def test_an_id_that_appears_twice_will_not_do_where_records_come_as_completed(pool, order, tmp_path, capsys):
    command = job_of(tmp_path, pool, *GOOD, GOOD[0])
    if order == "input":
        call(*command, "--output", tmp_path / "out.jsonl")
        assert [json.loads(own)["id"] for own in (tmp_path / "out.jsonl").read_text().splitlines()] == ["a", "b", "a"]
        return
    last = failed(capsys, [*command, "--order", order, "--output", tmp_path / "out.jsonl"])
    assert "line 1: the id 'a' appears again" in last and "--order input" in last
    assert not (tmp_path / "out.jsonl").exists()


# Many processes, many devices


@pytest.mark.parametrize("order", ORDERS)
def test_processes_share_a_job_and_the_last_one_merges(jobs, order, tmp_path, capsys):
    """One of them is killed and given again; the noise of a prompt is its own, whoever answers it."""
    command, whole = jobs
    output = tmp_path / "out.jsonl"
    share = lambda process: call(*command, "--order", order, "--output", output, "--processes", 3, "--process", process)
    for process in (2, 0, 1):
        assert not output.exists()
        share(process)
        if process == 0:
            part = tmp_path / "out-00000-of-00003.jsonl"
            part.write_bytes(part.read_bytes()[:-7])
    assert not output.exists()
    share(0)
    assert "are merged in" in capsys.readouterr().out
    assert_same(order, output, whole)


def test_a_job_whose_rows_change_their_drafters_goes_on_and_only_as_one(jobs, tmp_path, capsys):
    command, whole = jobs
    out = tmp_path / "out.jsonl"
    call(*command, "--online", "--output", out)
    records = out.read_bytes()
    for line, ours, theirs in zip(
        Path(command[3]).read_text().splitlines(), records.splitlines(), whole["input"].splitlines()
    ):
        if json.loads(line)["temperature"] == 0:
            assert json.loads(ours)["text"] == json.loads(theirs)["text"]
    out.write_bytes(records[: len(records) // 2])
    with pytest.raises(SystemExit):
        call(*command, "--output", out)
    assert "was begun with online True" in capsys.readouterr().err
    call(*command, "--online", "--output", out)
    assert out.read_bytes() == records
    with pytest.raises(SystemExit):
        call(*command, "--online", "--reliability", "--output", tmp_path / "other.jsonl")
    assert "give one of them" in capsys.readouterr().err


def test_a_process_that_is_none_of_the_job_is_refused(jobs, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        call(*jobs[0], "--output", tmp_path / "out.jsonl", "--processes", 2, "--process", 2)
    assert left.value.code == 2
    assert "--process 2 is out of range; give a number from 0 to 1" in capsys.readouterr().err


def test_a_job_on_a_mesh_says_the_same(jobs, pool, tmp_path, monkeypatch):
    """Weights are read into their sharding; slots are over `data`, the target's heads over `model`."""
    command, whole = jobs
    monkeypatch.setattr(generate, "load_pool", load_pool)
    call(*command, "--output", tmp_path / "out.jsonl", "--batch", 4, "--mesh.data", 2, "--mesh.model", 2)
    assert_same("input", tmp_path / "out.jsonl", whole)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--batch", 3, "--mesh.data", 2), "a batch of 3 does not divide over --mesh.data 2"),
        (("--mesh.model", 4), "--mesh.model 4 does not divide the target's 2 kv heads; give one of 1, 2"),
        (("--batch", 64, "--mesh.memory", 0.001), "a batch of 64 needs"),
    ],
)
def test_what_does_not_fit_the_devices_is_refused_before_weights_are_read(jobs, argv, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        call(*jobs[0], "--output", tmp_path / "out.jsonl", *argv)
    assert left.value.code == 2
    assert said in capsys.readouterr().err


def test_a_line_says_how_many_tokens_are_drafted_for_it(pool, tmp_path):
    """None is no speculation; the text is the same."""
    lines = [{"id": str(k), "prompt": "stir the soup", "num_speculative_tokens": k} for k in (0, 1, 2)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    call("--pool", pool, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", "--batch", 3)
    none, *some = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert none["num_draft_tokens"] == 0 and none["num_drafts"] == len(none["token_ids"])
    assert all(own["token_ids"] == none["token_ids"] and own["num_draft_tokens"] > 0 for own in some)


# Lines that name their drafter


@pytest.fixture(scope="module")
def named(pool, loaded, tmp_path_factory):
    """A pool with a copy of a specialist and its opposite added, prompts without a wish, and the same asked of all drafters."""
    folder = tmp_path_factory.mktemp("named")
    shutil.copytree(pool, folder / "pool")
    write_tree(extra_file(folder / "pool", "mine"), loaded.drafter("task 1"))
    opposite = loaded.drafter("task 1") | {"norm": jax.tree.map(jnp.negative, loaded.trunk["norm"])}
    write_tree(extra_file(folder / "pool", "opposite"), opposite)
    prompts = ["stir the garlic soup", "hoist our anchor before the wind", "prove every prime ideal"]
    lines = [{"id": f"{i}", "prompt": prompt, "max_new_tokens": 9} for i, prompt in enumerate(prompts)]
    wished = [own | {"id": f"{own['id']} {who}", "drafter": who} for own in lines for who in WISHES]
    for name, own in (("plain", lines), ("both", [*wished[:4], *lines, *wished[4:]])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in own))
    return folder, load_pool(str(folder / "pool"))


WISHES = ("task 1", "mine", "opposite", "mixed", "base", "trunk")


def records_of(named, name: str, *argv) -> tuple[Path, dict[str, dict]]:
    folder, own = named
    output = folder / f"{name}-{'-'.join(map(str, argv))}.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "load_pool", lambda *paths, **places: own)
        call("--pool", folder / "pool", "--input", folder / f"{name}.jsonl", "--output", output, *argv)
    return output, {line["id"]: line for line in map(json.loads, output.read_text().splitlines())}


@pytest.mark.parametrize("batch", [1, 3])
def test_a_line_has_the_drafter_that_it_names_and_the_others_texts_stay(named, batch):
    _, plain = records_of(named, "plain", "--batch", batch)
    output, both = records_of(named, "both", "--batch", batch)
    lines = [json.loads(line)["id"] for line in (named[0] / "both.jsonl").read_text().splitlines()]
    assert list(both) == lines
    counts = lambda own: {name: value for name, value in own.items() if name not in ("id", "drafter")}
    for i, own in plain.items():
        wished = {who: both[f"{i} {who}"] for who in WISHES}
        assert [record["drafter"] for record in wished.values()] == list(WISHES)
        assert {record["text"] for record in wished.values()} == {own["text"]} == {both[i]["text"]}
        assert {record["task"] for record in wished.values()} == {own["task"]}
        assert counts(wished["mine"]) == counts(wished["task 1"])
        assert 0 == wished["opposite"]["num_accepted_tokens"] < wished["task 1"]["num_accepted_tokens"]
    whole = output.read_bytes()
    output.write_bytes(whole[: len(whole) // 2])
    assert records_of(named, "both", "--batch", batch)[0].read_bytes() == whole


def test_records_in_the_prompts_order_do_not_wait_for_all_that_name_whole_drafters(named, monkeypatch):
    """No prompt of a later turn is served before those of an earlier one; the records are the same."""
    served, real = [], answers._served
    monkeypatch.setattr(answers, "_served", lambda *job: served.append([*job[-1]]) or real(*job))
    whole, _ = records_of(named, "both", "--batch", 1)
    monkeypatch.setattr(answers, "TURN", 4)
    served.clear()
    turned, _ = records_of(named, "both", "--batch", 1, "--admit-rows", 1)
    assert turned.read_bytes() == whole.read_bytes()
    turns = [i // 4 for rows in served for i in rows]
    assert len(turns) == len(whole.read_bytes().splitlines()) and turns == sorted(turns)


def test_a_name_that_a_task_and_another_drafter_have_is_asked_about(loaded):
    label = loaded.facts["labels"][1]
    facts = loaded.facts | {"added": {label: ""}}
    assert drafter_named(loaded.facts, label) == drafter_named(facts, "task 1") == 1
    with pytest.raises(UserError, match=f"'{label}' is the label of 'task 1' and the name of another.*say 'task 1'"):
        drafter_named(facts, label)


def test_lines_that_name_a_whole_drafter_do_not_change_who_serves_the_others(named):
    """Calibration may give all rows to `mixed`; a line that needs the bank prevents that, these do not."""
    folder, own = named
    facts = own.facts | {"acceptance_length": own.facts["acceptance_length"] | {"mixed": [[9.0] * 17] * 3}}
    lines = [{"id": str(i), "prompt": "stir the soup", "drafter": who} for i, who in enumerate(("mine", None))]
    (folder / "united.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, found = records_of((folder, dataclasses.replace(own, facts=facts)), "united", "--batch", 2)
    assert [record["drafter"] for record in found.values()] == ["mine", "mixed"]


def test_a_named_drafter_that_has_changed_is_not_gone_on_with(named, loaded, capsys):
    output, _ = records_of(named, "both", "--batch", 2)
    output.write_bytes(output.read_bytes()[:200])
    write_tree(extra_file(named[0] / "pool", "mine"), loaded.drafter("task 2"))
    with pytest.raises(SystemExit):
        records_of(named, "both", "--batch", 2)
    assert "was begun with added {'mine'" in capsys.readouterr().err
