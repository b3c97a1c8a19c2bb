"""A mistake ends in one sentence with what was received and what to do, exit code 2, and nothing finished is lost."""

import errno
import gzip
import json
import os
import shutil
from pathlib import Path

import conftest
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from decode import bench, generate, report
from jaxspec.config import Experiment, check_numbers, command_line
from jaxspec.store.huggingface import read_tokenizer, write_model
from jaxspec.store.loading import load_pool
from jaxspec.store.parts import alone
from jaxspec.store.stages import write_arrays, write_json
from jaxspec.store.trees import write_tree
from train import __main__ as pipeline
from train import align, calibrate, partition, router, trace

COMMANDS = {
    "train": (Experiment, pipeline.run),
    "trace": (Experiment, trace.run),
    "partition": (Experiment, partition.run),
    "align": (Experiment, align.run),
    "router": (Experiment, router.run),
    "calibrate": (Experiment, calibrate.run),
    "generate": (generate.Generate, generate.run),
    "bench": (bench.Bench, bench.run),
    "report": (report.ReportConfig, report.run),
}


def call(command: str, *argv):
    command_line(*COMMANDS[command], argv=[str(word) for word in argv])


@pytest.fixture
def refused(capsys):
    """`refused(command, *argv)`: runs what must end with exit code 2, and returns the sentence that it ends with."""

    def get(command: str, *argv) -> str:
        capsys.readouterr()
        said = failed(capsys, command, *argv).splitlines()
        assert [line for line in said if line.startswith("error: ")] == said[-1:]
        return said[-1]

    return get


def failed(capsys, command: str, *argv) -> str:
    with pytest.raises(SystemExit) as left:
        call(command, *argv)
    said = capsys.readouterr().err
    assert left.value.code == 2
    assert "Traceback" not in said
    return said


def assert_says(sentence: str, *parts):
    assert [part for part in map(str, parts) if part not in sentence] == [], sentence


def bytes_of(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# Models


@pytest.fixture
def own(world, tmp_path):
    """A copy of the models and the log, to be damaged."""
    return type(world)(*(Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in world))


def flags(own) -> list:
    return ["--target", own.target, "--draft", own.draft, "--prompts", own.prompts]


def cut(file: Path):
    file.write_bytes(file.read_bytes()[:-100])


def index(folder: Path):
    names = dict.fromkeys(load_file(folder / "model.safetensors"), "model-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def pickled(folder: Path):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def change(file: Path, **settings):
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


MODELS = {
    "no folder": (shutil.rmtree, "is not a model folder", "give a Hugging Face folder"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer", "copy the model's tokenizer"),
    "cut off": (lambda folder: cut(folder / "model.safetensors"), "model.safetensors is damaged", "copy it again"),
    "no shard": (index, "names model-00002.safetensors", "copy the missing shard"),
    "architecture": (
        lambda folder: change(folder / "config.json", model_type="mamba"), "'mamba' is not supported", "supported are",
    ),
    "pickle": (pickled, "pytorch_model.bin is a pickle", "convert it"),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("which", ["target", "draft"])
def test_a_model_that_will_not_do(refused, own, preset, tmp_path, name, which):
    damage, received, remedy = MODELS[name]
    damage(getattr(own, which))
    sentence = refused("trace", "--config", preset, *flags(own), "--out", tmp_path / "out")
    assert_says(sentence, getattr(own, which), received, remedy)
    assert not (tmp_path / "out").exists()


def test_tokenizers_that_differ_are_told_by_the_first_id(refused, own, preset, tmp_path):
    conftest.make_tokenizer("an entirely other choice of words").save_pretrained(own.draft)
    sentence = refused("trace", "--config", preset, *flags(own), "--out", tmp_path / "out")
    a, b = (read_tokenizer(str(folder)) for folder in (own.target, own.draft))
    first = next(i for i in range(1000) if a.convert_ids_to_tokens(i) != b.convert_ids_to_tokens(i))
    assert_says(sentence, f"id {first} is {a.convert_ids_to_tokens(first)!r} in {own.target}", own.draft, "needs a")


def test_vocabularies_may_be_padded_differently(world, pool):
    sizes = [json.loads((folder / "config.json").read_text())["vocab_size"] for folder in (world.target, world.draft)]
    assert sizes[0] != sizes[1]
    assert load_pool(pool).pair.vocab_size == sizes[0]


# The log


LOGS = {
    "not JSON": ('{"prompt": "stir"}\n{"prompt": stir}', "line 2 is not JSON", "one object a line"),
    "no object": ('["stir"]', "line 1", 'write {"prompt"'),
    "no prompt": ('{"prompt": "stir"}\n\n{"text": "bake"}', "line 3", 'write {"prompt"'),
    "empty": ('{"prompt": " "}', "line 1: the prompt is empty", "write a text"),
    "a number": ('{"prompt": 5}', "line 1", "a prompt is a text"),
    "messages": ('{"messages": 5}', "line 1", "messages a list"),
    "no role": ('{"messages": [{"content": "stir"}]}', "line 1", '"role"'),
    "response": ('{"prompt": "stir", "response": 5}', "response 5", "leave it out"),
    "template": ('{"messages": [{"role": "system", "content": "x"}]}', "(no system)", "mend its messages"),
    "too few": ('{"prompt": "stir"}', "1 of 1 prompts fit trace.max_prompt_tokens 100", "a longer log"),
    "none": ("\n", "holds no prompts", "each line must be"),
}


@pytest.mark.parametrize("name", LOGS)
def test_a_log_that_will_not_do(refused, preset, tmp_path, name):
    content, received, remedy = LOGS[name]
    (tmp_path / "log.jsonl").write_text(content + "\n")
    argv = ["--config", preset, "--prompts", tmp_path / "log.jsonl", "--out", tmp_path / "out"]
    sentence = refused("trace", *argv)
    assert_says(sentence, received, remedy)
    assert_says(sentence, *[tmp_path / "log.jsonl"] * (name != "too few"))


@pytest.mark.parametrize("kept", [5, 60, -1])
def test_a_gz_file_that_is_cut_off(refused, world, preset, tmp_path, kept):
    file = tmp_path / "log.jsonl.gz"
    file.write_bytes(gzip.compress((world.prompts / "algebra.jsonl").read_bytes())[:kept])
    sentence = refused("trace", "--config", preset, "--prompts", file, "--out", tmp_path / "out")
    assert_says(sentence, f"{file} cannot be read", "again")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--prompts", "nowhere"], ["'nowhere'", "no such file", "give a .jsonl"]),
        (["--include", "kitchen", "fishing"], ["no file fishing.jsonl", "it has", "sailing"]),
    ],
)
def test_a_log_that_is_not_there(refused, preset, tmp_path, argv, parts):
    assert_says(refused("trace", "--config", preset, "--out", tmp_path / "out", *argv), *parts)


# Settings


@pytest.mark.parametrize(
    ("stage", "argv", "parts"),
    [
        ("trace", ["--trace.batch", "0"], ["--trace.batch 0", "from 1"]),
        ("trace", ["--seed", "-1"], ["--seed -1", "from 0"]),
        ("trace", ["--seed", str(2**31)], [f"--seed {2**31}", "from 0 to"]),
        ("trace", ["--limit", "0"], ["--limit 0", "from 1"]),
        ("trace", ["--trace.temperature", "nan"], ["--trace.temperature nan", "from 0"]),
        ("trace", ["--trace.max-prompt-tokens", "149"], ["149", "12", "160 positions", "lower"]),
        ("trace", ["--trace.num-speculative-tokens", "17"], ["num_speculative_tokens 17", "at most 16"]),
        ("trace", ["--trace.num-speculative-tokens", "0"], ["num_speculative_tokens 0", "at least 1"]),
        ("trace", ["--trace.top-logits", "401"], ["top_logits 401", "at most 400"]),
        ("trace", ["--target", ""], ["--target is missing", "give a"]),
        ("trace", ["--out", ""], ["--out is missing", "--out runs/mine"]),
        ("align", ["--align.learning-rates"], ["--align.learning-rates is empty", "at least one"]),
        ("calibrate", ["--calibrate.lengths", "2", "17"], ["(2, 17)", "between 0 and 16"]),
        ("calibrate", ["--calibrate.lengths"], ["--calibrate.lengths is empty", "at least one"]),
        (
            "calibrate",
            ["--calibrate.further", "mine"],
            ["--calibrate.further 'mine'", "added to a pool (--pool", "ngram, NAME=POOL"],
        ),
        (
            "calibrate",
            ["--calibrate.further", "mine=tests"],
            ["mine=tests", "is not a pool (it has no manifest.json) and no drafter", "give OUT/pool"],
        ),
        ("calibrate", ["--calibrate.further", "tree=tests"], ["tree=", "has that name already", "another"]),
        ("align", ["--align.trunk", "1.5"], ["--align.trunk 1.5", "from 0 to 1"]),
        ("partition", ["--partition.min-clusters", "9", "--partition.max-clusters", "4"], ["min_clusters 9", "lower"]),
        ("partition", ["--partition.num-clusters", "49"], ["num_clusters 49", "the 48 prompts", "lower it"]),
        (
            "partition",
            ["--partition.features", "encoder"],
            ["partition.features=encoder", "--partition.encoder FOLDER"],
        ),
    ],
)
def test_a_setting_that_will_not_do(refused, preset, out_with, stage, argv, parts):
    out = out_with(*["trace", "partition", "align", "router"][: list(COMMANDS).index(stage) - 1])
    before = bytes_of(out)
    assert_says(refused(stage, "--config", preset, "--out", out, *argv), *parts)
    after = bytes_of(out)
    assert {file: after[file] for file in before} == before


def test_a_family_of_another_tokenizer_is_told_before_anything_is_written(refused, preset, out_with, own):
    conftest.make_tokenizer("quite other words than the log has").save_pretrained(own.draft)
    out = out_with("trace", "partition", "align", "router")
    sentence = refused("calibrate", "--config", preset, "--out", out, "--calibrate.further", f"mine={own.draft}")
    assert_says(sentence, "the tokenizers differ", own.draft, "the target's own tokenizer")
    assert [file.name for file in (out / "pool").iterdir()] == ["claim.json"]


@pytest.mark.parametrize(
    ("stage", "argv"),
    [
        ("trace", ["--trace.top-logits", "401"]),
        ("partition", ["--partition.num-clusters", "49"]),
        ("align", ["--align.trunk", "1"]),
        ("calibrate", ["--calibrate.lengths", "2", "17"]),
        ("calibrate", ["--calibrate.further", "big=nowhere"]),
    ],
)
def test_a_mistake_does_not_stand_in_the_way_of_what_is_right(refused, preset, out_with, stage, argv):
    out = out_with(*["trace", "partition", "align", "router"][: list(COMMANDS).index(stage) - 1])
    made = out / {"calibrate": "pool"}.get(stage, stage) / "manifest.json"
    refused(stage, "--config", preset, "--out", out, *argv)
    assert not made.exists()
    call(stage, "--config", preset, "--out", out)
    assert made.exists()


def test_as_many_clusters_as_prompts_are_made_when_asked_for(preset, out_with):
    out = out_with("trace")
    call("partition", "--config", preset, "--out", out, "--partition.num-clusters", "48")
    assert json.loads((out / "partition" / "manifest.json").read_text())["results"]["tasks"] == 48


def test_every_command_has_good_numbers(experiment):
    for config in (experiment, Experiment(), bench.Bench(pool="p"), generate.Generate(pool="p", input="i", output="o")):
        check_numbers(config)


@pytest.mark.parametrize(
    ("stage", "argv", "parts"),
    [
        ("trace", ["--trace.batch", "4"], ["trace.batch was 8", "is 4 now"]),
        ("trace", ["--include", "kitchen"], ["parents.prompts was"]),
        ("partition", ["--partition.num-clusters", "2"], ["partition.num_clusters was 3", "is 2 now"]),
        ("align", ["--align.rank", "2"], ["align.rank was 4", "is 2 now"]),
        ("router", ["--seed", "1"], ["seed was 0", "is 1 now"]),
        ("calibrate", ["--calibrate.lengths", "1"], ["calibrate.lengths was [1, 2]", "is [1] now"]),
    ],
)
def test_a_folder_of_another_experiment(refused, preset, finished, stage, argv, parts):
    before = bytes_of(Path(finished.out))
    sentence = refused(stage, "--config", preset, "--out", finished.out, *argv)
    assert_says(sentence, *parts, finished.out, "choose another --out")
    assert bytes_of(Path(finished.out)) == before


@pytest.mark.parametrize("stage", ["align", "calibrate"])
def test_a_model_that_was_not_traced(refused, preset, out_with, own, stage):
    out = out_with(*["trace", "partition", "align", "router"][: list(COMMANDS).index(stage) - 1])
    write_model(own.draft, conftest.DRAFT, conftest.random_params(conftest.DRAFT, 2, 1.0))
    sentence = refused(stage, "--config", preset, "--out", out, "--draft", own.draft)
    assert_says(sentence, f"--draft {own.draft} is not the draft of", "give that model")


@pytest.mark.parametrize("stage", ["partition", "align", "router", "calibrate"])
def test_a_stage_before_its_parents_says_what_to_run(refused, preset, finished, tmp_path, out_with, stage):
    folder = Path(finished.out, "pool" if stage == "calibrate" else stage)
    for parent in json.loads((folder / "manifest.json").read_text())["parents"]:
        sentence = refused(stage, "--config", preset, "--out", tmp_path / "out")
        assert_says(sentence, tmp_path / "out" / parent, "not a finished stage", f"run `python -m train.{parent}`")
        out_with(parent)


# The command line


@pytest.mark.parametrize(
    ("command", "argv", "named"),
    [
        ("trace", ["--trace.bach", "4"], ["--trace.bach"]),
        ("trace", ["--trace.batch", "many"], ["--trace.batch", "many"]),
        ("trace", ["--dtype", "float16"], ["--dtype", "float16", "bfloat16"]),
        ("generate", ["--pool", "p"], ["--input", "--output"]),
        ("bench", ["--pol", "p"], ["--pol"]),
    ],
)
@pytest.mark.parametrize("with_preset", [False, True])
def test_a_wrong_flag_or_value_is_named(capsys, preset, command, argv, named, with_preset):
    argv = ["--config", preset, *argv] if with_preset and COMMANDS[command][0] is Experiment else argv
    assert_says(failed(capsys, command, *argv), *named)


PRESETS = {
    "missing": (None, "No such file"),
    "broken": ("experiment = (", "SyntaxError"),
    "raises": ("from jaxspec.config import Experiment\nexperiment = Experiment(batch=3)", "batch"),
    "nameless": ("experience = 1", "no value named `experiment`"),
    "of another kind": ("experiment = 1", "of type int"),
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_that_will_not_do(refused, tmp_path, name):
    content, received = PRESETS[name]
    if content is not None:
        (tmp_path / "preset.py").write_text(content)
    assert_says(refused("trace", "--config", tmp_path / "preset.py"), "--config", received)


@pytest.mark.parametrize("argv", [["--config"], ["--config="], ["--config", "."]])
def test_a_preset_that_is_no_file(refused, argv):
    assert_says(refused("trace", *argv), "--config", "give the path of a preset")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_how_the_command_is_called(capsys, command):
    with pytest.raises(SystemExit) as left:
        call(command, "--help")
    package = "decode" if command in ("generate", "bench", "report") else "train"
    assert left.value.code == 0
    assert f"python -m {package}{'' if command == 'train' else '.' + command} " in capsys.readouterr().out


# The disk


def sabotage(monkeypatch, broken: str, part: Path):
    """What would be renamed from `part` cannot be written: a full disk in earnest, or a folder without permission."""
    real = os.replace

    def replace(source, destination):
        if Path(source) == part:
            raise PermissionError(errno.EACCES, "Permission denied", str(destination))
        return real(source, destination)

    if broken == "full":
        part.symlink_to("/dev/full")
    else:
        monkeypatch.setattr(os, "replace", replace)


@pytest.mark.parametrize(("broken", "said"), [("full", "No space left on device"), ("forbidden", "Permission denied")])
@pytest.mark.parametrize("file", ["shard-00001.npz", "manifest.json"])
def test_a_disk_that_refuses_costs_nothing_finished(
    refused, finished, preset, tmp_path, monkeypatch, file, broken, said
):
    if broken == "full" and not Path("/dev/full").exists():
        pytest.skip("no device that is always full")
    folder, part = tmp_path / "trace", tmp_path / "trace" / f".{file}.part"
    folder.mkdir()
    with monkeypatch.context() as patch:
        sabotage(patch, broken, part)
        assert_says(refused("trace", "--config", preset, "--out", tmp_path), said, "run the same command again")
    part.unlink(missing_ok=True)
    done = {own: own.stat().st_mtime_ns for own in folder.glob("shard-*")}
    assert len(done) == (1 if file.startswith("shard") else 2)
    call("trace", "--config", preset, "--out", tmp_path)
    assert {own: own.stat().st_mtime_ns for own in done} == done
    expected = json.loads(Path(finished.out, "trace", "manifest.json").read_text())
    assert json.loads((folder / "manifest.json").read_text())["results"] == expected["results"]


def test_a_file_where_a_folder_should_be(refused, preset, tmp_path):
    (tmp_path / "out").write_text("taken")
    assert_says(refused("trace", "--config", preset, "--out", tmp_path / "out"), tmp_path / "out", "again")
    assert (tmp_path / "out").read_text() == "taken"


WRITERS = {
    "json": lambda file, values: write_json(file, values.tolist()),
    "arrays": lambda file, values: write_arrays(file, {"values": values}),
    "tree": lambda file, values: write_tree(file, {"values": values}),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_is_replaced_whole_or_not_at_all(capsys, tmp_path, name):
    file, values = tmp_path / "file", np.arange(100_000)
    write = lambda values: command_line(Experiment, lambda experiment: WRITERS[name](file, values), argv=[])
    write(values[:10])
    before = file.read_bytes()
    with conftest.small_files(10_000), pytest.raises(SystemExit) as left:
        write(values)
    assert left.value.code == 2
    assert_says(capsys.readouterr().err, "error: ", "File too large", "run the same command again")
    assert file.read_bytes() == before
    write(values)
    assert len(file.read_bytes()) > 100_000


@pytest.mark.parametrize("kept", [0, 1, 1000, -1])
def test_a_damaged_shard_is_named(refused, preset, out_with, kept):
    shard = out_with("trace") / "trace" / "shard-00001.npz"
    shard.write_bytes(shard.read_bytes()[:kept])
    assert_says(refused("partition", "--config", preset, "--out", shard.parents[1]), shard, "damaged", "again")


# A pool and its jobs


def prompts_file(folder: Path, *lines: dict) -> Path:
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "in.jsonl"


def job(pool: str, file: Path, output: Path, *argv) -> list:
    return ["--pool", pool, "--input", file, "--output", output, "--batch", "2", "--max-new-tokens", "12", *argv]


@pytest.fixture
def in_memory(loaded, monkeypatch):
    """Jobs take the pool that was read already."""
    monkeypatch.setattr(generate, "load_pool", lambda *paths, **places: loaded)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"drafter": "fishing"}, ["no drafter 'fishing'", "it has trunk, ", "task 0"]),
        ({"drafter": ["base"]}, ["no drafter ['base']", "it has trunk, "]),
        ({"temprature": 1}, ["unknown key 'temprature'", "a line may have", "temperature"]),
        ({"max_new_tokens": "ten"}, ["max_new_tokens 'ten'", "a whole number from 1"]),
        ({"max_new_tokens": 0}, ["max_new_tokens 0", "from 1"]),
        ({"temperature": -0.5}, ["temperature -0.5", "from 0"]),
        ({"temperature": float("inf")}, ["temperature inf", "from 0"]),
        ({"top_k": 0}, ["top_k 0", "from 1"]),
        ({"top_p": 1.5}, ["top_p 1.5", "up to 1"]),
        ({"seed": 2**31}, [f"seed {2**31}", "from 0 to"]),
        ({"stop": 5}, ["stop 5", "a text or a list"]),
    ],
)
def test_a_line_that_asks_for_what_is_not_there(refused, pool, in_memory, tmp_path, settings, parts):
    file = prompts_file(tmp_path, {"prompt": "stir the soup"}, {"prompt": "bake"} | settings)
    sentence = refused("generate", *job(pool, file, tmp_path / "out.jsonl"))
    assert_says(sentence, f"{file}, line 2", *parts)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_line_that_names_what_rows_do_not_change_between(refused, pool, in_memory, tmp_path):
    file = prompts_file(tmp_path, {"prompt": "stir", "drafter": "mixed"}, {"prompt": "bake", "drafter": "base"})
    sentence = refused("generate", *job(pool, file, tmp_path / "out.jsonl", "--online"))
    assert_says(sentence, f"{file}, line 2", "the drafter 'base'", "leave out --online")


def test_an_output_that_another_program_wrote_is_left_as_it_is(refused, pool, in_memory, tmp_path):
    """Also where it has the ids of the prompts, or no end of line."""
    file = prompts_file(tmp_path, {"id": "a", "prompt": "stir"}, {"id": "b", "prompt": "bake"})
    for content in (
        '{"id": "a", "prompt": "stir"}\n',
        '{"results": [1, 2]}',
        '{"id": "a", "finish_reason": "stop"}\nnotes',
    ):
        (tmp_path / "out.jsonl").write_text(content)
        assert_says(
            refused("generate", *job(pool, file, tmp_path / "out.jsonl")), tmp_path / "out.jsonl", "choose another"
        )
        assert (tmp_path / "out.jsonl").read_text() == content


def test_an_output_among_the_prompts(refused, pool, in_memory, tmp_path):
    file = prompts_file(tmp_path, {"id": "a", "prompt": "stir"})
    content = file.read_text()
    for source, output in ((file, file), (tmp_path, tmp_path / "out.jsonl")):
        assert_says(refused("generate", *job(pool, source, output)), f"--output {output} lies in", "another place")
    assert file.read_text() == content and not (tmp_path / "out.jsonl").exists()


def test_an_output_that_is_being_written(refused, pool, in_memory, tmp_path):
    file = prompts_file(tmp_path, {"id": "a", "prompt": "stir"})
    with open(tmp_path / "out.jsonl", "ab") as out:
        alone(out, tmp_path / "out.jsonl")
        sentence = refused("generate", *job(pool, file, tmp_path / "out.jsonl"))
    assert_says(sentence, "another process is writing", tmp_path / "out.jsonl", "--process")
    assert (tmp_path / "out.jsonl").read_text() == ""


def test_an_output_of_another_input(refused, pool, in_memory, tmp_path):
    file = prompts_file(tmp_path, {"id": "a", "prompt": "stir"}, {"id": "b", "prompt": "bake"})
    for content, received in (('{"id": "c"}\n', "line 1"), ("[1]\n", "line 1"), ('{"id": "a"}\n' * 3, "3 records")):
        (tmp_path / "out.jsonl").write_text(content)
        assert_says(
            refused("generate", *job(pool, file, tmp_path / "out.jsonl")), tmp_path / "out.jsonl", received, "another"
        )
        assert (tmp_path / "out.jsonl").read_text() == content


def test_a_pool_of_an_earlier_version(refused, pool, tmp_path):
    own = tmp_path / "pool"
    shutil.copytree(pool, own)
    manifest = json.loads((own / "manifest.json").read_text())
    del manifest["results"]["acceptance_length"]
    (own / "manifest.json").write_text(json.dumps(manifest))
    file = prompts_file(tmp_path, {"prompt": "stir"})
    assert_says(refused("generate", *job(own, file, tmp_path / "out.jsonl")), own, "earlier version", "train.calibrate")


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--output", "nowhere/out.jsonl"], ["nowhere/out.jsonl", "make it first"]),
        (["--num-speculative-tokens", "17"], ["num_speculative_tokens 17", "to 16"]),
        (["--batch", "0"], ["--batch 0", "from 1"]),
        (["--input", "nowhere"], ["'nowhere'", "give a .jsonl"]),
        (["--pool", "nowhere"], ["'nowhere' is not a pool", "python -m train"]),
    ],
)
def test_a_job_that_cannot_begin(refused, pool, tmp_path, argv, parts):
    file = prompts_file(tmp_path, {"prompt": "stir"})
    assert_says(refused("generate", *job(pool, file, tmp_path / "out.jsonl", *argv)), *parts)


@pytest.mark.parametrize("command", ["generate", "bench"])
def test_a_stage_is_no_pool(refused, finished, tmp_path, command):
    folder = Path(finished.out, "align")
    rest = (
        job(str(folder), prompts_file(tmp_path, {"prompt": "stir"}), tmp_path / "out")[2:]
        if command == "generate"
        else []
    )
    assert_says(refused(command, "--pool", folder, *rest), f"'{folder}'", "not a pool", "give OUT/pool")


@pytest.mark.parametrize("which", ["target", "draft"])
def test_another_model_than_the_pool_was_made_with(refused, pool, own, which):
    folder = getattr(own, which)
    tensors = {name: np.zeros_like(value) for name, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    sentence = refused("bench", "--pool", pool, f"--{which}", folder)
    made_with = json.loads(Path(pool, "manifest.json").read_text())["results"][which]["digest"]
    assert_says(sentence, f"{folder} is not the {which} of this pool", made_with, f"--{which}")


@pytest.mark.parametrize("file", ["bank.safetensors", "mixed.safetensors", "router.safetensors", "manifest.json"])
def test_a_damaged_pool_is_named(refused, out_with, file):
    folder = out_with("pool") / "pool"
    cut(folder / file)
    assert_says(refused("bench", "--pool", folder), folder / file, "damaged", "run the stage")


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--methods", "base", "bigram"], ["--methods bigram", "choose among", "oracle"]),
        (["--num-speculative-tokens", "17"], ["num_speculative_tokens 17", "to 16"]),
        (["--num-speculative-tokens", "0"], ["num_speculative_tokens 0", "between 1 and 16"]),
        (["--json", "nowhere/bench.json"], ["nowhere/bench.json", "make it first"]),
        (["--widths", "1", "0"], ["--widths 0", "from 1"]),
        (["--rivals", "mixed=p"], ["--rivals mixed=p", "'mixed' already", "give another"]),
        (["--rivals", "a=p", "--methods", "b/mixed"], ["--methods b/mixed", "NAME/METHOD"]),
        (["--rivals", "a=nowhere"], ["--rivals needs --prompts"]),
        (["--rivals", "a=nowhere", "--prompts", "log"], ["--rivals a", "'nowhere' is not a pool"]),
    ],
)
def test_a_bench_that_cannot_begin(refused, pool, argv, parts):
    assert_says(refused("bench", "--pool", pool, *argv), *parts)


# The report


CONFUSION = {"tasks": ["a", "b"], "drafters": ["base", "a"], "counts": [[1, 2], [3, 4]]}
CLUSTERS = {"points": [[0.0, 1.0], [1.0, 0.0]], "cluster": [0, 1], "names": ["a", "b"], "task": ["a", None]}


def report_on(folder: Path, confusion: dict, clusters: dict) -> list:
    content = {"schema": 1, "router": {"confusion": confusion}, "clusters": clusters}
    (folder / "bench.json").write_text(json.dumps(content))
    return ["--bench", folder / "bench.json", "--out", folder / "report"]


@pytest.mark.parametrize("key", [*CONFUSION, "points", "cluster", "names"])
def test_a_bench_that_lacks_a_part(refused, tmp_path, key):
    parts = [{name: own for name, own in part.items() if name != key} for part in (CONFUSION, CLUSTERS)]
    sentence = refused("report", *report_on(tmp_path, *parts))
    assert_says(sentence, tmp_path / "bench.json", f"no list '{key}'", "run decode.bench again")
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("confusion", "clusters"),
    [
        ({"counts": [[1, 2]]}, {}),
        ({"counts": [[1, 2], [3]]}, {}),
        ({}, {"cluster": [0, 2]}),
        ({}, {"cluster": [0]}),
        ({}, {"points": [[0.0], [1.0]]}),
        ({}, {"task": ["a"]}),
    ],
)
def test_a_bench_whose_parts_do_not_fit(refused, tmp_path, confusion, clusters):
    sentence = refused("report", *report_on(tmp_path, CONFUSION | confusion, CLUSTERS | clusters))
    assert_says(sentence, "confusion" if confusion else "clusters", "do not belong together", "run decode.bench again")


def test_a_bench_whose_parts_fit_is_drawn(tmp_path):
    call("report", *report_on(tmp_path, CONFUSION, CLUSTERS))
    assert {"router_confusion.png", "clusters.png"} <= {file.name for file in (tmp_path / "report").iterdir()}
