"""Prompts that the target writes: they are its own words, a seed names them, and a killed run ends as another does."""

import dataclasses
import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import EOS, SPECIALS, TARGET, WORDS, make_tokenizer, random_params
from test_writing import along

from jaxspec.config import command_line
from jaxspec.store.huggingface import read_model, write_model
from jaxspec.store.models import encode
from jaxspec.store.prompts import Line, read_prompts
from jaxspec.store.traces import read_traces
from train import synthesize, trace
from train.synthesize import Synthesize, turn_of

NUMBER, LONGEST = 24, 16
BEGIN = [SPECIALS.index(own) for own in ("<bos>", "<user>")]
LLAMA_2 = "{{ bos_token }}[INST] {{ messages[0]['content'].strip() }} [/INST]"
WITH_SYSTEM = "{{ bos_token }}you salt{{ eos_token }}\n<user>\n{{ messages[0]['content'] }}{{ eos_token }}<assistant>\n"


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> str:
    """A target that says words of the log, and seldom a part of one: the embeddings' first column speaks for them."""
    folder, tokenizer, params = tmp_path_factory.mktemp("target"), make_tokenizer(), random_params(TARGET, 0, 3.0)
    log, said = " ".join(WORDS.values()).split(), [tokenizer.decode([i]) for i in range(TARGET.vocab_size)]
    strength = np.array([0.8 if own[:1] == " " and own[1:] in log else -0.8 for own in said], np.float32)
    strength[BEGIN], strength[EOS] = 0.2, 0.5
    table = params["embed"]["embedding"].at[:, 0].set(jnp.asarray(strength))
    write_model(folder, TARGET, params | {"embed": {"embedding": table}}, extra={"eos_token_id": EOS})
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def write(target, tmp_path_factory):
    """`write(name, *flags)`: the output of the command, which is gone on with where it is there."""
    folder = tmp_path_factory.mktemp("written")

    def written(name: str, *flags: Any):
        own = {"--number": NUMBER, "--max-prompt-tokens": LONGEST, "--batch": 8, "--target": target}
        given = own | dict(zip(flags[::2], flags[1::2], strict=True)) | {"--output": folder / name}
        argv = [str(word) for pair in given.items() for word in pair]
        command_line(Synthesize, synthesize.run, argv=argv)
        return folder / name

    return written


@pytest.fixture(scope="module")
def whole(write):
    return write("whole.jsonl")


def as_line(text: str) -> Line:
    return Line("", [{"role": "user", "content": text}], None, None, {}, "")


def test_as_many_as_were_asked_for_each_once_and_none_with_a_task(whole):
    lines = read_prompts(str(whole))
    assert len({own.text for own in lines}) == len({own.id for own in lines}) == len(lines) == NUMBER
    assert all(own.task is None and own.response is None for own in lines)
    assert not any(special in own.text for own in lines for special in SPECIALS)


def test_a_prompt_is_read_back_as_the_tokens_that_the_target_drew(whole, target):
    """Drawn again by number: each is kept but for repeats, short ones, and those that read back as other tokens."""
    tokenizer, model = make_tokenizer(), read_model(target)
    config = Synthesize(target=target, output="", max_prompt_tokens=LONGEST, batch=8)
    kept = {int(own.id.rpartition("-")[2]): own.text for own in read_prompts(str(whole))}
    drawn, real = [], synthesize._prompt
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthesize, "_prompt", lambda *known: drawn.append(known[-1]) or real(*known))
        draw = synthesize.drawing(config, model, tokenizer, turn_of(tokenizer))
        said = [text for first in range(0, max(kept) + 1, 8) for text in draw(first)]
    for number, (text, ids) in enumerate(zip(said, drawn, strict=True)):
        reads = list(encode(tokenizer, as_line(str(tokenizer.decode(ids))))) == [
            *BEGIN,
            *ids,
            SPECIALS.index("<assistant>"),
        ]
        assert (text is not None) == (reads and len(ids) >= config.min_prompt_tokens)
        assert number not in kept or kept[number] == text == tokenizer.decode(ids)
    left = {n for n, text in enumerate(said[: max(kept)]) if text} - kept.keys()
    assert all(said[n] in said[:n] for n in left) and None in said


def test_near_temperature_nothing_there_is_one_prompt_the_likeliest_and_what_lacks_is_told(write, target, capsys):
    with pytest.raises(SystemExit) as left:
        write("cold.jsonl", "--temperature", 1e-4, "--number", 2, "--min-prompt-tokens", 1)
    assert left.value.code == 2 and "has 1 prompts, --number 2" in capsys.readouterr().err
    (line,) = read_prompts(str(write("cold.jsonl", "--temperature", 1e-4, "--number", 1, "--min-prompt-tokens", 1)))
    ids, model = np.array(encode(make_tokenizer(), line)[:-1]), read_model(target)
    best = along(model.config, model.params, ids).argmax(-1)[len(BEGIN) - 1 :]
    assert best[:-1].tolist() == ids[len(BEGIN) :].tolist()
    assert len(ids) - len(BEGIN) == LONGEST or best[-1] < len(SPECIALS)


def test_a_seed_names_the_prompts_however_many_are_asked_for(write, whole):
    lines = whole.read_text().splitlines()
    fewer = write("fewer.jsonl", "--number", 5)
    assert fewer.read_text().splitlines() == lines[:5]
    assert write("fewer.jsonl").read_text().splitlines() == lines
    texts = lambda file: {json.loads(line)["prompt"] for line in file.read_text().splitlines()}
    assert len(texts(whole) & texts(write("other.jsonl", "--seed", 1))) < NUMBER // 2


@pytest.mark.parametrize("share", [0.0, 0.3, 0.97])
def test_a_killed_run_ends_as_an_undisturbed_one(write, whole, share):
    written = whole.read_bytes()
    file = whole.with_name(f"cut{share}.jsonl")
    file.write_bytes(written[: int(share * len(written))])
    assert write(file.name).read_bytes() == written


def test_alignment_takes_what_was_written_for_its_log(whole, target, experiment, tmp_path):
    own = dataclasses.replace(experiment, target=target, prompts=str(whole), out=str(tmp_path))
    trace.run(own)
    traces, lines = read_traces(str(tmp_path)), read_prompts(str(whole))
    expected = sorted(encode(make_tokenizer(), line) for line in lines)
    kept = zip(traces.tokens, traces.prompt_length, strict=True)
    assert sorted(tuple(row[:length].tolist()) for row, length in kept) == expected


@pytest.mark.parametrize("template", [LLAMA_2, WITH_SYSTEM, None], ids=["Llama 2", "with a system", "none"])
def test_a_message_begins_where_the_template_puts_it(template):
    """What the target would say with its tokens, to the turn's end, is the message."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    config, turn = Synthesize(target="", output="", min_prompt_tokens=1), turn_of(tokenizer)
    assert turn.begin == ((tokenizer.bos_token_id,) if template is None else turn.encoded)
    for text in ("stir the onion", "prove every\n\nprime  ideal"):
        ids = encode(tokenizer, as_line(text))
        assert ids[: len(turn.encoded)] == turn.encoded
        after = list(ids[len(turn.encoded) :])
        said = after[: after.index(EOS)] if EOS in after else after
        assert synthesize._prompt(config, tokenizer, turn, said) == text
        assert synthesize._prompt(config, tokenizer, turn, [*said[:2], said[0], *said[2:]]) != text
    trims = synthesize._prompt(config, tokenizer, turn, tokenizer(" salt  sugar  oven  ")["input_ids"])
    assert trims == (None if template == LLAMA_2 else " salt  sugar  oven  ")


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--target", ""), "--target is missing"),
        (("--temperature", 0), "give a number above 0"),
        (("--min-prompt-tokens", 17), "--min-prompt-tokens 17 exceeds --max-prompt-tokens 16"),
        (("--max-prompt-tokens", 159), "give at most 158"),
        (("--seed", 1), "was begun with seed 0, now it is 1"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(write, whole, capsys, flags, said):
    before = whole.read_bytes()
    with pytest.raises(SystemExit) as left:
        write(whole.name, *flags)
    assert left.value.code == 2 and said in capsys.readouterr().err
    assert whole.read_bytes() == before


@pytest.mark.parametrize("there", [b'{"prompt": "stir"}\n', b"my notes"])
def test_a_file_of_somebody_else_is_left_as_it_is(write, whole, capsys, there):
    file = whole.with_name("mine.jsonl")
    file.write_bytes(there)
    with pytest.raises(SystemExit):
        write(file.name)
    assert "did not write" in capsys.readouterr().err and file.read_bytes() == there


@pytest.mark.parametrize("name", ["log.txt", "nowhere/log.jsonl"])
def test_an_output_that_no_log_can_be_is_refused(write, capsys, name):
    with pytest.raises(SystemExit):
        write(name)
    assert "give a .jsonl file in a folder that exists" in capsys.readouterr().err
