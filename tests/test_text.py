"""Text in, text out: whole characters, nothing of a stop string, and the same answer however it is asked for."""

import json
import random

import pytest
from conftest import WORDS, make_tokenizer

import jaxspec
from decode import generate as job
from jaxspec import text
from jaxspec.config import UserError
from jaxspec.store.families import options
from jaxspec.text import LOST, Reader

PROMPTS = ["stir the onion soup", "hoist our anchor before wind", "prove every prime ideal", "bake"]
SETTINGS = {"max_new_tokens": 20, "temperature": 0.8, "top_k": 30, "seed": 3, "batch": 3}


@pytest.fixture(scope="module")
def answers(loaded):
    return list(jaxspec.generate(loaded, PROMPTS, **SETTINGS))


def decoded(pool, ids) -> str:
    return pool.pair.tokenizer.decode(ids, skip_special_tokens=True)


# What is asked and what comes back


def test_answers_come_in_the_order_of_the_prompts(loaded, answers):
    assert [own.index for own in answers] == list(range(len(PROMPTS)))
    for own in answers:
        assert own.text == decoded(loaded, own.token_ids)
        assert own.finish_reason == ("stop" if own.token_ids[-1] in loaded.pair.stop_tokens else "length")
        assert own.num_drafts <= len(own.token_ids) <= own.num_drafts + own.num_accepted_tokens
        assert sum(own.num_accepted_tokens_per_pos) <= own.num_accepted_tokens <= own.num_draft_tokens
        assert own.drafter in loaded.names and own.task in loaded.tasks and 0 < own.route_confidence <= 1


def test_the_library_and_the_job_answer_alike(loaded, pool, answers, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "load_pool", lambda *paths, **places: loaded)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": own}) + "\n" for own in PROMPTS))
    files = {"pool": pool, "input": str(tmp_path / "in.jsonl"), "output": str(tmp_path / "out.jsonl")}
    job.run(job.Generate(**files, **SETTINGS))
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    for record, own in zip(records, answers, strict=True):
        assert record.pop("id").startswith(str(tmp_path / "in.jsonl"))
        assert record == {name: vars(own)[name] for name in record} and record.keys() >= {"text", "token_ids"}


def test_a_chat_of_one_message_is_the_prompt_that_it_holds(loaded, answers):
    chats = [[{"role": "user", "content": own}] for own in PROMPTS]
    assert list(jaxspec.generate(loaded, chats, **SETTINGS)) == answers
    longer = [[*chats[0], {"role": "assistant", "content": "salt"}, *chats[1]], *chats[1:]]
    assert list(jaxspec.generate(loaded, longer, **SETTINGS))[1:] == answers[1:]


def test_pieces_make_up_the_answers(loaded, answers):
    texts, ends = dict.fromkeys(range(len(PROMPTS)), ""), {}
    for piece in jaxspec.stream(loaded, PROMPTS, **SETTINGS):
        assert piece.text or piece.completion
        assert piece.index not in ends
        texts[piece.index] += piece.text
        if piece.completion:
            ends[piece.index] = piece.completion
    assert [ends[i] for i in range(len(PROMPTS))] == answers
    assert [texts[i] for i in range(len(PROMPTS))] == [own.text for own in answers]


def test_asked_again_in_the_same_shape_nothing_compiles(loaded, answers):
    engine = text.engine_of(loaded, options(loaded.facts, slots=3).families, "rejection", 3, SHAPE["room"], False)
    compiled = list(engine.compiled)
    assert compiled
    again = jaxspec.generate(loaded, [*PROMPTS[::-1], "bake the salt"], **SETTINGS | {"max_new_tokens": 31, "top_k": 3})
    assert len(list(again)) == 5
    list(jaxspec.stream(loaded, PROMPTS, **SETTINGS | {"stop": "e"}))
    assert {own.name for own in engine.compiled[len(compiled) :]} <= {"halt"}


SHAPE = {"room": text.room_of(32, 32)}


@pytest.mark.parametrize(
    ("prompts", "settings", "parts"),
    [
        (["stir", " \n"], {}, ["prompt 1 is empty", "write a text"]),
        (["stir", [{"role": "user", "content": ""}]], {}, ["prompt 1 is empty"]),
        (["bake " * 150], {"max_new_tokens": 20}, ["prompt 0 has", "140 is the most", "lower max_new_tokens"]),
        (["stir"], {"drafter": "fishing"}, ["no drafter 'fishing'", "it has trunk"]),
        (["stir"], {"num_speculative_tokens": 17}, ["num_speculative_tokens 17", "to 16"]),
        (["stir"], {"temperature": -0.5}, ["temperature -0.5", "from 0"]),
        (["stir"], {"top_p": 1.5}, ["top_p 1.5", "up to 1"]),
        (["stir"], {"max_new_tokens": 0}, ["max_new_tokens 0", "from 1"]),
        (["stir"], {"acceptance": "gumbell"}, ["acceptance 'gumbell'", "rejection, gumbel"]),
        (["stir"], {"batch": 0}, ["batch 0", "from 1"]),
        (["stir"], {"tempperature": 1.0}, ["unknown setting 'tempperature'"]),
        ([[{"role": "system", "content": "x"}]], {}, ["prompt 0", "(no system)"]),
    ],
)
@pytest.mark.parametrize("ask", [jaxspec.generate, jaxspec.stream])
def test_a_mistake_is_one_sentence(loaded, ask, prompts, settings, parts):
    with pytest.raises(UserError) as refused:
        list(ask(loaded, prompts, **settings))
    sentence = str(refused.value)
    assert [part for part in parts if part not in sentence] == [] and "\n" not in sentence


# Where an answer ends


def first_end(pool, ids: list[int], stops) -> tuple[int, str] | None:
    """Tokens up to the one that completes a stop string, and the text before it, found by decoding every beginning."""
    for number in range(1, len(ids) + 1):
        own = decoded(pool, ids[:number])
        if found := [at for stop in stops if (at := own.find(stop)) >= 0]:
            return number, own[: min(found)]
    return None


def stop_within(pool, ids: list[int], begin: int, count: int) -> str:
    """A stop string that begins inside token `begin` and ends inside another, `count` tokens on."""
    before, whole = decoded(pool, ids[:begin]).rstrip(LOST), decoded(pool, ids[: begin + count]).rstrip(LOST)
    return whole[len(before) :]


@pytest.mark.parametrize(("begin", "count"), [(0, 1), (3, 1), (2, 4), (7, 6), (15, 5)])
def test_a_stop_string_ends_an_answer_wherever_it_begins(loaded, answers, begin, count):
    stops = [stop for own in answers if (stop := stop_within(loaded, own.token_ids, begin, count))]
    assert stops
    texts = dict.fromkeys(range(len(PROMPTS)), "")
    ended = 0
    for piece in jaxspec.stream(loaded, PROMPTS, stop=stops, **SETTINGS):
        texts[piece.index] += piece.text
        if piece.completion:
            own, free = piece.completion, answers[piece.index]
            ids, said = first_end(loaded, free.token_ids, stops) or (len(free.token_ids), free.text)
            assert (own.token_ids, own.text) == (free.token_ids[:ids], said)
            cut = first_end(loaded, free.token_ids, stops) is not None
            assert own.finish_reason == ("stop" if cut else free.finish_reason)
            assert own.num_drafts <= ids and own.num_drafts <= free.num_drafts
            assert ids <= own.num_drafts + own.num_accepted_tokens <= free.num_drafts + free.num_accepted_tokens
            assert texts[piece.index] == own.text and not any(stop in own.text for stop in stops)
            ended += cut
    assert ended


def test_an_earlier_stop_string_wins_over_the_stop_token_and_the_budget(loaded, answers):
    """The string is completed by the very last token, by the one before it, and never."""
    free = max(answers, key=lambda own: len(own.text.rstrip(LOST)))
    prompt, size = PROMPTS[free.index], len(free.token_ids)
    for number, reason in ((size, "stop"), (size - 1, "stop")):
        whole = decoded(loaded, free.token_ids[:number])
        stop = whole[-3:]
        expected = first_end(loaded, free.token_ids, [stop])
        chosen = {"stop": stop, **SETTINGS}
        (own,) = (c for c in jaxspec.generate(loaded, PROMPTS, **chosen) if c.index == PROMPTS.index(prompt))
        assert (len(own.token_ids), own.text, own.finish_reason) == (*expected, reason)
    never = [own for own in jaxspec.generate(loaded, PROMPTS, stop="\0 never \0", **SETTINGS)]
    assert never == answers


# The reader


TEXTS = {
    "emoji": "bake 🥧👩‍🍳 now 🏴‍☠️🎉",
    "accents": "café naïve Zürich Ångström e\u0301",
    "chinese": "先炒洋葱再放盐。煮汤",
    "mixed": "stir 洋葱 é🧅 soup\n\t\u00a0end",
    "a lost character of its own": "bad \ufffd byte, and at the end \ufffd\ufffd",
}
TOKENIZER = make_tokenizer()
ALPHABET = [*" ".join(WORDS.values()), *"éü炒🥧"]


def fed(reader: Reader, ids: list[int], size: int):
    """What the reader gives out after each `size` tokens, and at the end."""
    for at in range(0, len(ids), size):
        kept = reader.push(ids[at : at + size])
        yield reader.take(ended=kept is not None), ids[: at + size], kept
        if kept is not None:
            return
    yield reader.take(ended=True), ids, None


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("name", TEXTS)
def test_pieces_hold_whole_characters_and_hold_back_nothing_else(name, size):
    ids = TOKENIZER(TEXTS[name])["input_ids"]
    given = ""
    *pieces, last = fed(Reader(TOKENIZER, ()), ids, size)
    for piece, seen, _ in pieces:
        given += piece
        assert given == TOKENIZER.decode(seen).rstrip(LOST)
    assert given + last[0] == TEXTS[name]


def test_a_text_that_ends_in_half_a_character_says_so_only_at_its_end():
    ids = TOKENIZER("bake 🥧")["input_ids"][:-1]
    *pieces, (last, _, _) = fed(Reader(TOKENIZER, ()), ids, 1)
    assert LOST not in "".join(piece for piece, *_ in pieces)
    assert last == LOST


def test_special_tokens_are_not_read_and_hide_nothing_beside_them():
    bos, *rest = TOKENIZER.convert_tokens_to_ids(["<bos>", "<user>"])
    ids = [bos, *TOKENIZER("stir é")["input_ids"], *rest, *TOKENIZER(" 炒 soup")["input_ids"], bos]
    assert "".join(piece for piece, *_ in fed(Reader(TOKENIZER, ()), ids, 1)) == "stir é 炒 soup"


class Spaced:
    """Decodes as SentencePiece does: a word brings its space along, and the first one of a text loses it."""

    def decode(self, ids, skip_special_tokens=True):
        return "".join(("", " stir", " the", " soup", "s")[token] for token in ids).removeprefix(" ")


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_space_that_only_a_texts_first_word_loses_is_kept_behind_special_tokens(size):
    ids = [0, 1, 0, 0, 2, 0, 3, 4, 0]
    assert "".join(piece for piece, *_ in fed(Reader(Spaced(), ()), ids, size)) == "stir the soups"


def test_of_two_stop_strings_completed_by_one_token_the_earlier_ends_the_text():
    reader = Reader(Spaced(), ("ir", "ti"))
    assert (reader.push([2, 1, 3]), reader.take(ended=True)) == (2, "the s")


def random_text(draw: random.Random, words: int) -> str:
    return "".join(draw.choice([*ALPHABET, "stir", " onion", "🥧é", "ab"]) for _ in range(words))


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("seed", range(40))
def test_nothing_of_a_stop_string_is_given_out(seed, size):
    """Stops are taken from the text itself or nearly; they begin and end inside tokens, overlap, and share beginnings."""
    draw = random.Random(seed)
    whole = random_text(draw, 30)
    ids = TOKENIZER(whole)["input_ids"]
    stops = []
    for _ in range(draw.randint(1, 3)):
        begin = draw.randrange(len(whole) - 6)
        stops.append(whole[begin : begin + draw.randint(1, 6)] + draw.choice(["", "", "炒", "q"]))
    told = list(fed(Reader(TOKENIZER, stops), ids, size))
    given, kept = "".join(piece for piece, *_ in told), told[-1][2]
    expected = next(
        (n for n in range(1, len(ids) + 1) if any(stop in TOKENIZER.decode(ids[:n]) for stop in stops)), None
    )
    ended = TOKENIZER.decode(ids[:expected])
    cut = min((at for stop in stops if (at := ended.find(stop)) >= 0), default=len(ended))
    assert given == ended[:cut]
    assert kept == (None if expected is None else (expected - 1) % size + 1)


def test_a_beginning_of_a_stop_string_is_held_back_while_its_next_character_is_half_read():
    reader = Reader(TOKENIZER, ("stir🥧",))
    ids = TOKENIZER("now stir🥧")["input_ids"]
    given = "".join(piece for piece, *_ in fed(reader, ids, 1))
    assert given == reader.text == "now "
