"""Jobs that trigram tables draft for: they learn from finished texts, and no text depends on what was learnt."""

import functools
import json
import random

import jax
import numpy as np
import pytest

import jaxspec
from decode import answers, generate
from jaxspec import pooled, trigrams
from jaxspec.config import command_line
from jaxspec.store.loading import load_pool
from jaxspec.store.stages import read_arrays, write_arrays

ADAPTIVE = ("--drafter", "adaptive")


@pytest.fixture(scope="module")
def lines(world):
    """Prompts of all tasks; some rows sample, and end at a string."""
    draw, found = random.Random(1), []
    for file in sorted(world.prompts.iterdir()):
        for line in file.read_text().splitlines()[:5]:
            own = {"max_new_tokens": draw.randint(6, 20), "temperature": draw.choice((0, 0.7))}
            found.append(json.loads(line) | own | ({"stop": "e"} if draw.random() < 0.3 else {}))
    return found


@pytest.fixture(scope="module")
def job(loaded, pool, lines, tmp_path_factory):
    """`job(name, *flags)`: the output of a job; an equal job has compiled its engine."""
    folder = tmp_path_factory.mktemp("tables")

    def answer(name, *flags, lines=lines, batch=1, k=6):
        (folder / f"{name}.in").mkdir(exist_ok=True)
        (folder / f"{name}.in" / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        command = ["--pool", pool, "--input", folder / f"{name}.in", "--output", folder / name, "--batch", batch]
        command += ["--num-speculative-tokens", k, *flags]
        command_line(generate.Generate, generate.run, argv=[str(word) for word in command])
        return folder / name

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "load_pool", lambda *paths, **places: loaded)
        patch.setattr(pooled, "adapting", functools.cache(pooled.adapting))
        yield answer


@pytest.fixture(scope="module")
def whole(job):
    """A job that nothing disturbed, one prompt at a time."""
    return job("whole.jsonl", *ADAPTIVE)


def records(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def texts(file):
    """By their ids; in whatever order they came."""
    return {own["id"]: (own["token_ids"], own["text"], own["finish_reason"]) for own in records(file)}


def table_of(file):
    return read_arrays(file.with_name(f"{file.name}.trigrams.npz"))


def rounds(file):
    return sum(own["num_drafts"] for own in records(file))


def test_texts_are_those_of_models_that_share_the_noise(job, whole):
    """Drafted by chains under Gumbel coupling; the rule that was asked for is the other."""
    models = job("models.jsonl", "--acceptance", "gumbel", k=2)
    assert texts(models) == texts(whole)
    assert {own["drafter"] for own in records(whole)} == {"adaptive"}
    assert sum(own["num_accepted_tokens"] for own in records(whole)) > 0


@pytest.mark.parametrize("order", ["input", "completed"])
def test_texts_depend_neither_on_the_batch_nor_on_the_order_of_the_prompts(job, whole, lines, order):
    shuffled = random.Random(2).sample(lines, len(lines))
    other = job(f"{order}.jsonl", *ADAPTIVE, "--order", order, lines=shuffled, batch=3)
    assert texts(other) == texts(whole)
    assert [own["num_drafts"] for own in records(other)] != [own["num_drafts"] for own in records(whole)]


@pytest.mark.parametrize("share", [0.0, 0.35, 0.8, 1.0])
def test_wherever_a_job_was_cut_off_its_records_and_its_table_end_the_same(job, whole, share):
    written, table = whole.read_bytes(), table_of(whole)
    whole.write_bytes(written[: int(share * len(written))])
    whole.with_name(f"{whole.name}.trigrams.npz").unlink()
    assert job("whole.jsonl", *ADAPTIVE) == whole and whole.read_bytes() == written
    jax.tree.map(np.testing.assert_array_equal, table_of(whole), table)


def test_lines_of_one_id_are_learnt_each_with_its_own_prompt(job, lines):
    alike = [line | {"id": str(number // 2)} for number, line in enumerate(lines[:6])]
    file = job("alike.jsonl", *ADAPTIVE, lines=alike)
    written, table = file.read_bytes(), table_of(file)
    file.write_bytes(b"".join(written.splitlines(keepends=True)[:5]))
    job("alike.jsonl", *ADAPTIVE, lines=alike)
    assert file.read_bytes() == written
    jax.tree.map(np.testing.assert_array_equal, table_of(file), table)


def test_the_next_job_begins_with_what_the_last_has_learnt(job, whole, loaded):
    """Of prompts that it has answered tables know every text; the pool's table is as it was."""
    left = whole.with_name(f"{whole.name}.trigrams.npz")
    then = job("then.jsonl", *ADAPTIVE, "--table", left)
    assert texts(then) == texts(whole) and rounds(then) < rounds(whole)
    ids = [*records(whole)[0]["token_ids"]]
    known = trigrams.Trigrams(**table_of(whole))
    for *bigram, token in zip(ids, ids[1:], ids[2:], strict=False):
        tokens, weight = trigrams.looked_up(jax.tree.map(jax.numpy.asarray, known), jax.numpy.array(bigram))
        assert token in np.asarray(tokens)[np.asarray(weight) > 0]
    assert not np.asarray(loaded.trigrams.weight).any()


def test_what_is_drafted_counts_levels_and_no_calls(job, lines):
    """With as many nodes as there are, and with none."""
    many = records(job("many.jsonl", *ADAPTIVE, lines=lines[:3], k=16))
    none = records(job("none.jsonl", *ADAPTIVE, lines=lines[:3], k=0))
    assert [own["token_ids"] for own in many] == [own["token_ids"] for own in none]
    assert all(own["num_draft_tokens"] <= pooled.LEVELS * own["num_drafts"] for own in many)
    assert all(own["num_draft_tokens"] == 0 and own["num_drafts"] == len(own["token_ids"]) for own in none)


def test_a_line_may_ask_for_tables_if_all_do(job, whole, lines, capsys):
    asking = [line | {"drafter": "adaptive"} for line in lines]
    assert job("asking.jsonl", lines=asking).read_bytes() == whole.read_bytes()
    with pytest.raises(SystemExit) as end:
        job("some.jsonl", lines=[*asking[:2], lines[2]])
    assert end.value.code == 2 and "for all prompts of a job or for none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--table", "nowhere.npz"), "--table nowhere.npz: no such file"),
        ((*ADAPTIVE, "--online"), "--online judges drafters that are models, `adaptive` is none"),
        ((*ADAPTIVE, "--reliability"), "--reliability judges"),
        (("--drafter", "fishing"), "no drafter 'fishing' in this pool; it has trunk, "),
    ],
)
def test_what_will_not_do_is_told(job, flags, said, capsys):
    with pytest.raises(SystemExit) as end:
        job("refused.jsonl", *flags)
    assert end.value.code == 2 and said in capsys.readouterr().err


def test_a_file_that_is_no_table_or_that_nothing_drafts_with_is_refused(job, whole, tmp_path, capsys):
    write_arrays(tmp_path / "half.npz", {"bigram": np.zeros((4, 2), np.int32)})
    for flags, said in (
        ((*ADAPTIVE, "--table", tmp_path / "half.npz"), "is damaged (it lacks tokens, weight)"),
        (("--table", tmp_path / "half.npz"), "--table needs --drafter adaptive"),
    ):
        with pytest.raises(SystemExit):
            job("refused.jsonl", *flags)
        assert said in capsys.readouterr().err
    written = whole.read_bytes()
    whole.write_bytes(written[: len(written) // 2])
    with pytest.raises(SystemExit):
        job("whole.jsonl", *ADAPTIVE, "--table", tmp_path / "half.npz")
    assert "was begun with table None" in capsys.readouterr().err
    whole.write_bytes(written)


def test_a_table_that_is_the_jobs_own_or_another_than_it_began_with_is_refused(job, whole, tmp_path, capsys):
    left = table_of(whole)
    with pytest.raises(SystemExit):
        job("whole.jsonl", *ADAPTIVE, "--table", whole.with_name(f"{whole.name}.trigrams.npz"))
    assert "where this job leaves its own; copy it" in capsys.readouterr().err
    write_arrays(tmp_path / "table.npz", left)
    begun = job("begun.jsonl", *ADAPTIVE, "--table", tmp_path / "table.npz")
    begun.write_bytes(begun.read_bytes()[:300])
    write_arrays(tmp_path / "table.npz", left | {"weight": 2 * left["weight"]})
    with pytest.raises(SystemExit):
        job("begun.jsonl", *ADAPTIVE, "--table", tmp_path / "table.npz")
    assert "was begun with table " in capsys.readouterr().err


def test_where_no_line_can_be_answered_that_is_what_is_told(job, whole, tmp_path, capsys):
    write_arrays(tmp_path / "table.npz", table_of(whole))
    with pytest.raises(SystemExit):
        job("unanswered.jsonl", *ADAPTIVE, "--table", tmp_path / "table.npz", lines=[{"prompt": "stir " * 5000}])
    assert "1 prompts were not answered" in capsys.readouterr().err


def test_a_drafter_of_the_job_serves_the_lines_that_name_none(job, lines):
    named = [lines[0], lines[1] | {"drafter": "trunk"}]
    assert [own["drafter"] for own in records(job("named.jsonl", "--drafter", "task 1", lines=named, k=2))] == [
        "task 1", "trunk",
    ]  # fmt: skip


@pytest.mark.slow
def test_in_the_library_tables_draft_on_request(loaded):
    prompts, settings = ["stir the onion", "hoist our anchor"], {"max_new_tokens": 60, "batch": 2, "temperature": 0.05}
    own = list(jaxspec.generate(loaded, prompts, drafter="adaptive", **settings))
    plain = jaxspec.generate(loaded, prompts, acceptance="gumbel", **settings)
    assert [one.token_ids for one in own] == [one.token_ids for one in plain]
    assert {one.drafter for one in own} == {"adaptive"} and sum(one.num_accepted_tokens for one in own) > 0


@pytest.mark.slow
def test_on_a_mesh_tables_draft_the_same(job, whole, monkeypatch):
    """What is learnt there stays where the programs want it: nothing compiles again."""
    compiled = []
    monkeypatch.setattr(generate, "load_pool", load_pool)
    monkeypatch.setattr(answers, "explain", lambda engine: compiled.extend(engine.compiled))
    other = job("mesh.jsonl", *ADAPTIVE, "--explain", "--mesh.data", 2, "--mesh.model", 2, batch=4)
    assert texts(other) == texts(whole)
    assert len([own for own in compiled if own.name == "chunk"]) <= 2  # of tables as read, and as learnt
