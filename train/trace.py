"""Replays the log through base speculative decoding and keeps what the later stages need.

    python -m train.trace --config configs/testbed.py --target ... --draft ... --prompts ... --out runs/testbed

For every prompt: its tokens and the output, what the base drafter proposed and whether it was accepted, the target's
pooled features, and its largest probabilities with the tail's mass for every emitted token. Outputs are the target's, or
those of the log or of the drafter, which the target reads. One shard a batch; a killed run goes on with the first batch that
has no shard.
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxspec import sharding, verify
from jaxspec.align import top_and_tail
from jaxspec.config import Experiment, Trace, UserError, command_line, plain
from jaxspec.drafters import lm_drafter
from jaxspec.drafters.lm import LMDrafterParams
from jaxspec.engine import Engine, Method, unrouted
from jaxspec.recording import Recorder, place
from jaxspec.requests import MAX_DRAFT, Request, bucket_of, room_of
from jaxspec.slots import pool_features
from jaxspec.store.models import Pair, encode, read_pair
from jaxspec.store.prompts import Line, read_prompts
from jaxspec.store.stages import Stage, digest_of, finish, open_stage, write_arrays, write_whole
from jaxspec.store.traces import split_of
from jaxspec.target import lm_target
from jaxspec.transformer import forward, unembed
from jaxspec.types import Placement
from jaxspec.writing import Author, answering

FEWEST = 10  # below that a tenth of the log is less than a prompt
REFILLS = 4  # requests that a slot serves in one shard
READ = 64  # whole texts are padded to a multiple of so many tokens: few programs, little padding
ARRAYS = ("top_ids", "top_log_p", "tail_log_p", "draft")


def run(experiment: Experiment) -> None:
    """Writes `out/trace`: `log.jsonl` and one `shard-*.npz` a batch."""
    mesh = sharding.asked(experiment.mesh)
    sharding.check_rows(experiment.trace.batch, mesh, "--trace.batch")
    pair = read_pair(experiment.target, experiment.draft, experiment.dtype, mesh)
    lines = read_prompts(experiment.prompts, include=experiment.include, limit=experiment.limit, seed=experiment.seed)
    _check(experiment.trace, pair)
    stage = _open(experiment, pair, lines)
    if stage.complete:
        return print(f"trace: complete in {stage.folder}")
    lines, requests, left_out = _fitting(experiment, pair, lines)
    write_whole(stage.folder / "log.jsonl", partial(_write_log, lines=lines))
    jobs = _jobs(experiment, pair, lines, requests)
    decode = _decoding(experiment, pair, sharding.over(mesh))
    read = _reading(experiment, pair, sharding.over(mesh))
    write = _writing(experiment, pair, sharding.over(mesh))
    tokens = 0
    with tqdm(total=len(lines), desc="trace", unit="prompt") as bar:
        for number, (source, rows) in enumerate(jobs):
            file = stage.folder / f"shard-{number:05d}.npz"
            if not file.exists():
                own = [requests[i] for i in rows]
                if source == "target":
                    arrays = decode(own)
                elif source == "log":
                    arrays = read(own, [_response(pair, lines[i]) for i in rows])
                else:  # along its own text the drafter is right by definition, which says nothing of acceptance
                    nothing = np.zeros(len(rows), np.int64)
                    arrays = read(own, write(own)) | {"drafted": nothing, "accepted": nothing}
                write_arrays(file, {"row": np.array(rows), **arrays})
                tokens += int((arrays["length"] - arrays["prompt_length"]).sum())
            bar.update(len(rows))
            bar.set_postfix(tokens=tokens)
    finish(stage, prompts=len(lines), left_out=left_out, shards=len(jobs))
    if left_out:
        print(f"trace: {left_out} prompts longer than trace.max_prompt_tokens were left out")


def _open(experiment: Experiment, pair: Pair, lines: Sequence[Line]) -> Stage:
    said = digest_of([[line.id, line.messages, line.response] for line in lines])
    parents = {"target": pair.target.digest, "draft": pair.draft.digest, "prompts": said}
    config = {"trace": plain(experiment.trace), "dtype": experiment.dtype, "seed": experiment.seed}
    return open_stage(experiment.out, "trace", config=config, parents=parents)


def _check(spec: Trace, pair: Pair) -> None:
    if spec.max_prompt_tokens + spec.max_new_tokens > pair.longest:
        raise UserError(
            f"trace.max_prompt_tokens {spec.max_prompt_tokens} and trace.max_new_tokens {spec.max_new_tokens} exceed "
            f"the models' {pair.longest} positions; lower one of them"
        )
    most = {"num_speculative_tokens": MAX_DRAFT, "top_logits": pair.vocab_size}
    for name, limit in most.items():
        if not 1 <= getattr(spec, name) <= limit:
            raise UserError(f"trace.{name} {getattr(spec, name)} will not do; give at least 1 and at most {limit}")


def _fitting(experiment: Experiment, pair: Pair, lines: Sequence[Line]):
    """Lines whose prompt fits, their requests, and how many do not."""
    spec = experiment.trace
    ids = [encode(pair.tokenizer, line) for line in lines]
    fits = [i for i, own in enumerate(ids) if 0 < len(own) <= spec.max_prompt_tokens]
    if len(fits) < FEWEST:
        raise UserError(
            f"{len(fits)} of {len(lines)} prompts fit trace.max_prompt_tokens {spec.max_prompt_tokens}, {FEWEST} are "
            "needed to train, calibrate and test; raise it or give a longer log"
        )
    requests = [
        Request(
            ids=ids[i],
            max_new_tokens=spec.max_new_tokens,
            number=i,
            seed=experiment.seed,
            temperature=spec.temperature,
        )
        for i in fits
    ]
    return [lines[i] for i in fits], requests, len(lines) - len(fits)


def _jobs(experiment: Experiment, pair: Pair, lines: Sequence[Line], requests: Sequence[Request]):
    """Shards as (who writes their outputs, rows): by prompt bucket to decode, by whole length to read."""
    spec = experiment.trace
    sources = _sources(spec, lines, experiment.seed)
    of = lambda source: [i for i, own in enumerate(sources) if own == source]
    shards = lambda source, rows, size: [(source, rows[at : at + size]) for at in range(0, len(rows), size)]
    bucket = lambda i: bucket_of(len(requests[i].ids), spec.smallest_bucket)
    whole = {i: len(requests[i].ids) + min(len(_response(pair, lines[i])), spec.max_new_tokens) for i in of("log")}
    return [
        *shards("target", sorted(of("target"), key=bucket), REFILLS * spec.batch),
        *shards("log", sorted(whole, key=whole.__getitem__), spec.batch),
        *shards("draft", sorted(of("draft"), key=lambda i: len(requests[i].ids)), spec.batch),
    ]


def _sources(spec: Trace, lines: Sequence[Line], seed: int) -> list[str]:
    """Who writes each line's output: `log`, `target` or `draft`, and this never where acceptance will be measured."""
    drawn = np.random.default_rng((seed, 1)).choice(["log", "target", "draft"], len(lines))
    asked = drawn.tolist() if spec.texts == "mix" else [spec.texts] * len(lines)
    if spec.texts in ("draft", "mix"):
        asked = ["target" if held else own for own, held in zip(asked, split_of(len(lines), seed) > 0, strict=True)]
    said = lambda own, line: "target" if own == "log" and line.response is None else own
    return [said(own, line) for own, line in zip(asked, lines, strict=True)]


def _response(pair: Pair, line: Line) -> list[int]:
    ids = pair.tokenizer(line.response, add_special_tokens=False)["input_ids"]
    return [*ids, *pair.stop_tokens[:1]]


def _decoding(experiment: Experiment, pair: Pair, placement: Placement):
    """requests -> arrays, by speculative decoding with the base drafter."""
    spec = experiment.trace
    dtype = jnp.dtype(experiment.dtype)
    drafter = lm_drafter(pair.draft.config, spec.num_speculative_tokens, vocab_size=pair.vocab_size, dtype=dtype)
    recorder = recording(spec.max_new_tokens, spec.top_logits, pair.target.config.width)
    engine = Engine(
        lm_target(pair.target.config, dtype),
        drafter,
        verify.greedy if spec.temperature == 0 else verify.rejection,
        pair.target.params,
        stop_tokens=pair.stop_tokens,
        slots=spec.batch,
        room=room_of(bucket_of(spec.max_prompt_tokens, spec.smallest_bucket), spec.max_new_tokens),
        vocab_size=pair.vocab_size,
        smallest=spec.smallest_bucket,
        recorder=recorder,
        placement=placement,
    )
    base = Method("base", unrouted, lambda routes: LMDrafterParams(pair.draft.params))

    def decode(requests: Sequence[Request]) -> dict[str, np.ndarray]:
        done = engine.complete(requests, base)
        outputs = [c.ids for c in done]
        record = jax.tree.map(lambda *leaves: np.stack(leaves), *[c.record for c in done])
        arrays = _texts(requests, outputs, spec.max_new_tokens)
        arrays |= {name: record[name] for name in ARRAYS}
        arrays["drafted"] = np.array([c.counts.drafted_by_position.sum() for c in done])
        arrays["accepted"] = np.array([c.counts.accepted_by_position.sum() for c in done])
        summed = record["features"] / np.maximum([[len(o)] for o in outputs], 1)
        arrays["output_features"] = _unit(summed)
        arrays["prompt_features"] = np.stack([c.features for c in done])
        return arrays | {"draft_features": _bag(pair.target.params, arrays["draft"])}

    return decode


def recording(room: int, top: int, width: int) -> Recorder:
    """Keeps, for every emitted token, the target's `top` largest log-probabilities with the tail's, and the draft there.

    Buffers are `[B, room, ...]`, indexed by output position; `features` is the sum of the hidden states behind them.
    """

    def init(prompt):
        batch = prompt.length.shape[0]
        zeros = lambda *shape, dtype=jnp.float32: jnp.zeros((batch, *shape), dtype)
        return {
            "origin": jnp.asarray(prompt.length),
            "top_ids": zeros(room, top, dtype=jnp.int32),
            "top_log_p": zeros(room, top),
            "tail_log_p": zeros(room),
            "draft": jnp.full((batch, room), -1, jnp.int32),
            "features": zeros(width),
        }

    def fold(record, info):
        verdict = info.verdict
        offset = info.start - record["origin"]
        real = jnp.arange(verdict.tokens.shape[1]) < verdict.num_emitted[:, None]
        along = lambda x: jnp.take_along_axis(x, verdict.path[..., None], axis=1)
        top_ids, top_log_p, tail = top_and_tail(along(info.scores.logits), top)
        drafted = jnp.pad(info.draft.tokens, ((0, 0), (0, 1)), constant_values=-1)
        there = jnp.arange(drafted.shape[1]) < info.num_drafted[:, None]
        new = {"top_ids": top_ids, "top_log_p": top_log_p, "tail_log_p": tail, "draft": jnp.where(there, drafted, -1)}
        out = {name: place(record[name], value, offset, real) for name, value in new.items()}
        hidden = jnp.where(real[..., None], along(info.scores.features).astype(jnp.float32), 0.0)
        return out | {"origin": record["origin"], "features": record["features"] + hidden.sum(1)}

    return Recorder(init, fold)


def _reading(experiment: Experiment, pair: Pair, placement: Placement):
    """(requests, responses) -> arrays, by one teacher-forced pass of both models: outputs that are written already."""
    spec = experiment.trace
    target, draft = pair.target.config, pair.draft.config

    @partial(jax.jit, static_argnames="room")
    def score(target_params, draft_params, tokens, prompt_length, length, room):
        hidden = forward(target, target_params, tokens)
        along = partial(answering, prompt_length=prompt_length, room=room)
        top = top_and_tail(unembed(target, target_params, along(hidden)), spec.top_logits)
        guess = unembed(draft, draft_params, along(forward(draft, draft_params, tokens)), pair.vocab_size)
        answered = (jnp.arange(room) < (length - prompt_length)[:, None])[..., None]
        summed = jnp.where(answered, along(hidden).astype(jnp.float32), 0.0).sum(1)
        return (*top, jnp.argmax(guess, -1), pool_features(hidden, prompt_length), summed)

    def read(requests: Sequence[Request], responses: Sequence[list[int]]) -> dict[str, np.ndarray]:
        room = spec.max_new_tokens
        responses = [r[:room] for r in responses]
        arrays = _texts(requests, responses, room)
        longest = int(arrays["length"].max())
        whole = np.zeros((spec.batch, -(-longest // READ) * READ), np.int32)
        whole[: len(requests), :longest] = arrays["tokens"][:, :longest]
        pad = lambda x: np.pad(x, (0, spec.batch - len(requests)), constant_values=1)
        lengths = pad(arrays["prompt_length"]), pad(arrays["length"])
        rows = placement.rows((whole, *lengths))
        out = jax.device_get(score(pair.target.params, pair.draft.params, *rows, room))
        ids, kept, tail, guess, prompt_features, summed = (x[: len(requests)] for x in out)
        arrays |= {"top_ids": ids, "top_log_p": kept, "tail_log_p": tail}
        arrays |= _simulate(guess, responses, spec.num_speculative_tokens)
        arrays["prompt_features"] = prompt_features
        arrays["output_features"] = _unit(summed)
        return arrays | {"draft_features": _bag(pair.target.params, arrays["draft"])}

    return read


def _writing(experiment: Experiment, pair: Pair, placement: Placement):
    """requests -> outputs, by the base drafter alone."""
    spec = experiment.trace
    author = Author(
        pair.draft.config,
        vocab_size=pair.vocab_size,
        stop_tokens=pair.stop_tokens,
        rows=spec.batch,
        bucket=bucket_of(spec.max_prompt_tokens, spec.smallest_bucket),
        most=spec.max_new_tokens,
        sampled=spec.temperature > 0,
        dtype=jnp.dtype(experiment.dtype),
        placement=placement,
    )
    return partial(author.answers, pair.draft.params)


def _simulate(guess: np.ndarray, outputs: Sequence[list[int]], k: int) -> dict[str, np.ndarray]:
    """Greedy chain drafting along given outputs: what was proposed where (-1: nothing), drafted and accepted counts."""
    draft = np.full(guess.shape, -1, np.int32)
    drafted, accepted = np.zeros(len(outputs), np.int64), np.zeros(len(outputs), np.int64)
    for row, output in enumerate(outputs):
        at = 0
        while at < len(output):
            block = range(at, min(at + k, len(output)))
            run = next((n for n, i in enumerate(block) if guess[row, i] != output[i]), len(block))
            upto = min(run + 1, len(block))
            draft[row, at : at + upto] = guess[row, at : at + upto]
            drafted[row] += len(block)
            accepted[row] += run
            at += run + 1
    return {"draft": draft, "drafted": drafted, "accepted": accepted}


def _texts(requests: Sequence[Request], outputs: Sequence[list[int]], room: int) -> dict[str, np.ndarray]:
    width = max(len(r.ids) for r in requests) + room
    tokens = np.zeros((len(requests), width), np.int32)
    for i, (request, output) in enumerate(zip(requests, outputs, strict=True)):
        tokens[i, : len(request.ids) + len(output)] = [*request.ids, *output]
    prompt_length = np.array([len(r.ids) for r in requests], np.int32)
    length = prompt_length + np.array([len(o) for o in outputs], np.int32)
    return {"tokens": tokens, "prompt_length": prompt_length, "length": length}


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-9)


def _bag(target_params: dict, draft: np.ndarray) -> np.ndarray:
    """The base draft as a unit vector: the mean of the target's embeddings of the proposed tokens."""
    table = np.asarray(target_params["embed"]["embedding"], np.float32)
    proposed = (draft >= 0)[..., None]
    return _unit((table[np.maximum(draft, 0)] * proposed).sum(1))


def _write_log(file: Path, lines: Sequence[Line]) -> None:
    with open(file, "w", encoding="utf-8") as handle:
        for line in lines:
            handle.write(json.dumps({"id": line.id, "messages": line.messages, "task": line.task}) + "\n")


if __name__ == "__main__":
    command_line(Experiment, run)
