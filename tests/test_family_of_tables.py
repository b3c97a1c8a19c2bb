"""Trigram tables as a family: what is measured is what decoding has, and a pool chooses them where they are the fastest."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from test_families import again, knowing

from decode import bench, widened
from decode.settings import Bench
from jaxspec import forced, pooled, serving, trigrams
from jaxspec.config import UserError
from jaxspec.drafters import adaptive_drafter
from jaxspec.requests import MAX_DRAFT, Request
from jaxspec.router import token_seconds
from jaxspec.store.facts import calibration
from jaxspec.store.families import options
from jaxspec.store.loading import load_pool
from jaxspec.store.names import TRIGRAMS
from jaxspec.store.recalibration import read_sample
from jaxspec.store.stages import digest_of_file, write_arrays
from jaxspec.text import generate, stream
from train import calibrate

NODES = (1, 2, 5, MAX_DRAFT)


@pytest.fixture(scope="module")
def sample(loaded):
    return read_sample(loaded.path)


@pytest.fixture(scope="module")
def taught(pool, sample, tmp_path_factory) -> Path:
    """The finished pool with a table of some of the texts that it is calibrated by."""
    folder = tmp_path_factory.mktemp("taught") / "pool"
    shutil.copytree(pool, folder)
    table = trigrams.counted(sample.texts.tokens[::3], 1 << 10)
    write_arrays(folder / TRIGRAMS, jax.tree.map(np.asarray, table)._asdict())
    return folder


@pytest.fixture(scope="module")
def calibrated(finished, taught, tmp_path_factory):
    """It, calibrated with tables and n-gram lookup beside its own drafters."""
    out = tmp_path_factory.mktemp("tables")
    calibrate.run(again(finished, taught, ("adaptive", "ngram"), out))
    return load_pool(str(out / "pool"))


def by_task(sample, settings: dict) -> list[list[Request]]:
    """The prompts of the calibrate split, each with as many tokens as its text has."""
    begin = lambda i: int(sample.texts.prompt_length[i])
    ids = lambda i: tuple(sample.texts.tokens[i][: begin(i)].tolist())
    left = lambda i: len(sample.texts.tokens[i]) - begin(i)
    of = lambda i: Request(ids=ids(i), max_new_tokens=left(i), number=int(sample.number[i]), **settings)
    return [[of(i) for i in rows] for rows in sample.of_each(48)]


@pytest.mark.parametrize("nodes", NODES)
def test_measured_tokens_a_round_are_those_of_decoding(calibrated, sample, nodes):
    """Of as many nodes as are asked for, with what each row learns from its own prompt and text."""
    found = calibrated.facts["further"]["adaptive"]["acceptance_length"]["adaptive"]
    engine = pooled.adapting(calibrated, nodes, slots=4, room=160)
    method, accepted = serving.always(calibrated, "adaptive", 4), 0
    for requests, measured in zip(by_task(sample, {}), found, strict=True):
        counts = [own.counts for own in engine.complete(requests, method)]
        rounds, tokens = (sum(getattr(own, name) for own in counts) for name in ("num_drafts", "num_emitted"))
        assert measured[nodes] == pytest.approx(tokens / rounds)
        accepted += tokens - rounds
    assert accepted > 20 and found != [[1.0] * (MAX_DRAFT + 1)] * 3  # else the law says little


def test_what_rows_learn_counts(calibrated, loaded, sample):
    """Nothing is learnt from text to text, so that their order is no matter; and without learning less is accepted."""
    judge, empty = forced.Judge(loaded.pair, sample, 48), trigrams.empty(1 << 10)
    tables = lambda gain: judge.looked_up(adaptive_drafter(MAX_DRAFT, depth=6, gain=gain), empty)
    assert tables(0.0) == [[1.0] * (MAX_DRAFT + 1)] * 3
    own, rows = tables(trigrams.GAIN), sample.of_each(48)
    assert sum(each[MAX_DRAFT] for each in own) > 3.0
    turned = forced.lookups(pooled.without_weights("adaptive", MAX_DRAFT), sample.texts, rows[0][::-1], empty)
    assert forced.acceptance_length([run[:, 5] for run in turned], 5) == own[0][5]


def test_a_row_in_the_table_of_seconds_counts_nodes(calibrated, taught):
    own = calibrated.facts["further"]["adaptive"]
    assert calibration(own).keys() == {1, 2, MAX_DRAFT} and own["digest"] == digest_of_file(taught / TRIGRAMS)
    among = options(calibrated.facts)
    assert among.lengths == (1, 2, MAX_DRAFT) and among.names == (*calibrated.names, "adaptive", "ngram")
    rounds = np.array([calibration(own)[k]["round_milliseconds"] / 1e3 for k in among.lengths])
    accepted = np.array([[each[k] for k in among.lengths] for each in own["acceptance_length"]["adaptive"]])
    row = among.seconds[among.names.index("adaptive")]
    kept = np.isfinite(row)
    np.testing.assert_allclose(row[kept], token_seconds(accepted, rounds)[kept])
    others = [i for i, name in enumerate(among.names) if name != "adaptive"]
    assert np.isinf(among.seconds[others, :, 2]).all()


@pytest.fixture(scope="module")
def prompts(world) -> list[str]:
    lines = [line for file in sorted(world.prompts.iterdir()) for line in file.read_text().splitlines()[:2]]
    return [json.loads(line)["prompt"] for line in lines]


BEST = {0: ("adaptive", MAX_DRAFT), 1: ("task 1", 2), 2: ("mixed", 1)}


GUMBEL = pytest.param({"temperature": 0.8, "acceptance": "gumbel"}, marks=pytest.mark.slow)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8}, GUMBEL])
def test_tables_are_chosen_where_they_are_the_fastest_and_texts_do_not_know(calibrated, prompts, settings):
    """A text that tables drafted is that of the noise, whatever rule the others have; with them it counts alike."""
    pool, shape = knowing(calibrated, BEST), {"batch": 1, "max_new_tokens": 12, **settings}
    done = list(generate(pool, prompts, **shape))
    said = [own.drafter for own in done]
    assert said == [BEST[pool.tasks.index(own.task)][0] for own in done]
    assert {*said} == {"adaptive", "task 1", "mixed"}
    of_noise = list(generate(pool, prompts, **shape | {"num_speculative_tokens": 0, "acceptance": "gumbel"}))
    tables = list(generate(pool, prompts, drafter="adaptive", **shape))
    counted = lambda own: (own.token_ids, own.num_drafts, own.num_draft_tokens, own.num_accepted_tokens)
    same = settings.get("acceptance") or not settings
    for own, plain, alone in zip(done, of_noise, tables, strict=True):
        assert own.token_ids == plain.token_ids or (own.drafter != "adaptive" and not same)
        assert own.drafter != "adaptive" or counted(own) == counted(alone)
    assert [piece.completion for piece in stream(pool, prompts, **shape) if piece.completion] == done


def test_bench_says_by_how_many_nodes(calibrated, world, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "load_pool", lambda *paths, **places: knowing(calibrated, BEST))
    where = {"pool": str(calibrated.path), "prompts": str(world.prompts), "json": str(tmp_path / "bench.json")}
    bench.run(Bench(**where, methods=("chosen",), limit=2, max_new_tokens=12, passes=1, widths=(1,)))
    told = json.loads((tmp_path / "bench.json").read_text())
    said = {who for task in told["choices"].values() for who in task}
    assert f"adaptive, {MAX_DRAFT} nodes" in said and said & {"task 1, K = 2", "mixed, K = 1"}
    assert all(own["chosen"]["equal_to_autoregressive"] == 1.0 for own in told["tasks"].values())


def test_rounds_of_tables_are_timed_again_where_the_target_is_another(calibrated, monkeypatch):
    monkeypatch.setattr(widened, "timed", lambda ways, *rest: {way: {"round_milliseconds": 7.0} for way in ways})
    request = Request(ids=(1, 2, 3), max_new_tokens=4)
    found = widened.retimed(calibrated, [request], slots=1, room=96).facts["further"]
    rounds = {
        name: {k: row["round_milliseconds"] for k, row in calibration(own).items()} for name, own in found.items()
    }
    assert rounds == {"adaptive": {1: 7.0, 2: 7.0, MAX_DRAFT: 7.0}, "ngram": {1: 7.0, 2: 7.0}}


def test_a_table_that_was_counted_since_is_not_taken_for_the_one_that_was_measured(
    finished, taught, calibrated, tmp_path
):
    spec, out = ("adaptive", "ngram"), calibrated.path.parent
    calibrate.run(again(finished, taught, spec, out))  # complete: skipped
    shutil.copytree(taught, tmp_path / "pool")
    table = trigrams.counted([[1, 2, 3, 4]], 1 << 10)
    write_arrays(tmp_path / "pool" / TRIGRAMS, jax.tree.map(np.asarray, table)._asdict())
    with pytest.raises(UserError, match=r"belongs to another experiment: files\.adaptive was .* choose another --out"):
        calibrate.run(again(finished, tmp_path / "pool", spec, out))


def test_tables_that_are_nowhere_the_fastest_are_not_read(calibrated, prompts, monkeypatch):
    pool = knowing(calibrated, {0: ("task 0", 2), 1: ("ngram", 1), 2: ("mixed", 1)})
    assert [name for name, _ in options(pool.facts).families] == ["", "ngram"]
    monkeypatch.setattr(type(pool), "trigrams", None)
    assert {own.drafter for own in generate(pool, prompts, batch=1, max_new_tokens=4)} == {"task 0", "ngram", "mixed"}


def test_a_table_that_is_not_the_one_that_was_measured_is_refused(finished, calibrated, prompts, tmp_path, capsys):
    """Until it is measured again; other tables, and none, are named by what they are."""
    folder = tmp_path / "pool"
    shutil.copytree(calibrated.path, folder)
    chosen = lambda: dataclasses.replace(knowing(calibrated, BEST), path=folder)
    assert next(generate(chosen(), prompts, batch=1, max_new_tokens=2))
    (folder / TRIGRAMS).unlink()
    again_at = (
        rf"run `python -m train\.calibrate --pool {folder} --calibrate\.further adaptive ngram` with another --out"
    )
    with pytest.raises(UserError, match=rf"{TRIGRAMS} is not the table that the pool was calibrated with; {again_at}"):
        list(generate(chosen(), prompts, batch=1, max_new_tokens=2))
    assert next(generate(chosen(), prompts, drafter="adaptive", max_new_tokens=2)).drafter == "adaptive"
    calibrate.run(again(finished, folder, ("adaptive",), tmp_path / "out"))
    said = capsys.readouterr().out
    assert "calibrate: adaptive: an empty table; `python -m train.extras` counts one" in said
    assert "calibrate: adaptive, 16 nodes: " in said and "calibrate: K = 2: " in said
    found = load_pool(str(tmp_path / "out" / "pool"))
    assert found.facts["further"]["adaptive"]["digest"] == ""
    assert pooled.choosing(found, (("", (2,)), ("adaptive", (2, 16))), slots=1, room=96).lengths == [2, 16]
    with pytest.raises(
        UserError, match=r"--calibrate\.further adaptive=\.\.\.: the pool or bench has that name already"
    ):
        calibrate.run(again(finished, folder, (f"adaptive={folder}",), tmp_path / "other"))
