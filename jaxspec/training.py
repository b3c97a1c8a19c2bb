"""One training run of alignment: drafters side by side over a mesh, from the choice of a learning rate to the last step.

Weights and optimiser state are split as `sharding` says, and stay so: the step's program names the layout of what it is fed
again. A run leaves its curves, on its own rows and on those held out, and goes on where it was killed.
"""

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from jaxspec import sharding
from jaxspec.align import Aligner, AlignState, Batch, schedule
from jaxspec.config import Align
from jaxspec.packing import as_batch, places
from jaxspec.store.curves import HELD, Log
from jaxspec.store.stages import is_writer, write_json
from jaxspec.store.traces import Texts, Traces
from jaxspec.store.trees import Checkpoints

LOGITS = 1 << 32  # bytes of logits of the drafters that are trained in one product
SEARCH_WARMUP = 0.3  # in a short run a high rate would be met before Adam knows its scale
SAY_EVERY = 10  # steps


class Course(NamedTuple):
    """One training run: its name, the drafters trained side by side, where rows come from, and how long.

    params: stacked `[D, ...]`; frozen: what all of them share; train, held: rows of each drafter; falls: whether the
    learning rate ends low, or another run goes on from this one.
    """

    name: str
    aligner: Aligner
    frozen: Any
    params: Any
    train: list[list[list[int]]]
    held: list[list[list[int]]]
    steps: int
    rates: tuple[float, ...]
    falls: bool = True


class Programs(NamedTuple):
    """What a run does over and over: fresh: () -> state; advance: (state, step, rate) -> (state, metrics); judge: params ->
    loss and agreement of each drafter on the rows held out, `[D]`."""

    fresh: Callable[[], AlignState]
    advance: Callable[..., tuple[AlignState, dict]]
    judge: Callable[[Any], dict[str, np.ndarray]]


def trained(spec: Align, traces: Traces, course: Course, folder: Path, mesh: Mesh, write: Callable | None) -> dict:
    """Trains; where tokens are selected, once on all of them before, which makes the reference and finds the rate.

    AdaSPEC trains its reference likewise from where the drafter starts. From a reference that is that start, the base or the
    trunk, only tokens that have become worse would stand out. A trunk, from which others go on, sees all tokens.

    Args:
        write: what a drafter writes, see `train.align.writing`; None where no drafter's own texts are trained on.

    Returns:
        figures before and after on the rows held out, the rate, the cost, and `params`, split over the mesh.
    """
    train = partial(_train, spec, traces, folder=folder, mesh=mesh, write=write)
    if spec.select == 1 or not course.falls:
        return train(course)
    first = train(course._replace(name=f"{course.name}_reference"))
    return train(course._replace(rates=(first["learning_rate"],)), reference=first["params"])


def rows_of(spec: Align, share: float) -> int:
    """A share of a step's rows."""
    return round(share * spec.rows)


def placed(tree: Any, mesh: Mesh) -> Any:
    """Weights in training, or what goes with them, in their place."""
    return sharding.place(tree, sharding.param_specs(tree, sharding.TRAINED), mesh)


def _train(
    spec: Align,
    traces: Traces,
    course: Course,
    *,
    folder: Path,
    mesh: Mesh,
    write: Callable | None,
    reference: Any = None,
) -> dict:
    """Chooses the learning rate, trains, and says what the calibrate split thinks of it; resumes where it was killed."""
    started = time.time()
    course = course._replace(frozen=placed(course.frozen, mesh), params=placed(course.params, mesh))
    own = _programs(spec, traces, course, mesh, write, reference)
    before = own.judge(course.params)
    rate = _choose_rate(course, spec.search_steps, own, folder)
    checkpoints = Checkpoints(folder / "checkpoints" / course.name)
    with Log(folder / "metrics.jsonl", course.name) as log:
        if spec.evaluate_every:
            log.write(0, before, HELD)
        state = _steps(spec, course, own, rate, checkpoints, log)
    checkpoints.close()
    after = {name: float(value.mean()) for name, value in own.judge(state.params).items()}
    figures = {
        "before": float(before["agreement"].mean()),
        "agreement": after["agreement"],
        "divergence": after["loss"],
    }
    cost = {"parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)), "seconds": time.time() - started}
    return {**figures, "learning_rate": rate, "steps": course.steps, **cost, "params": state.params}


def _steps(spec: Align, course: Course, own: Programs, rate: float, checkpoints: Checkpoints, log: Log) -> AlignState:
    """The steps that no checkpoint has; what was said of a step is on the disk before the checkpoint that has it."""
    done, state = checkpoints.latest(own.fresh())
    due = lambda at, every: every and (at % every == 0 or at == course.steps)
    with tqdm(total=course.steps, initial=done, desc=course.name, disable=not is_writer()) as bar:
        for step in range(done, course.steps):
            now = schedule(step, course.steps, rate, spec.warmup, falls=course.falls)
            state, metrics = own.advance(state, step, now)
            if due(step + 1, SAY_EVERY):
                log.write(step + 1, metrics)
                bar.set_postfix({name: f"{np.mean(value):.3f}" for name, value in jax.device_get(metrics).items()})
            if due(step + 1, spec.evaluate_every):
                log.write(step + 1, own.judge(state.params), HELD)
            if (step + 1) % spec.checkpoint_every == 0:
                checkpoints.save(step + 1, state)
            bar.update()
    return state


def _programs(
    spec: Align, traces: Traces, course: Course, mesh: Mesh, write: Callable | None, reference: Any
) -> Programs:
    room = places(traces, [row for rows in [*course.train, *course.held] for row in rows], spec.row_tokens)
    of = jax.eval_shape(_init(course), course.params)
    split = sharding.shardings(sharding.param_specs(of, sharding.TRAINED), mesh)
    everywhere = sharding.shardings(sharding.spec(part=sharding.TRAINED), mesh)
    fresh = jax.jit(_init(course), out_shardings=split)
    side_by_side = jax.jit(partial(_each, course.aligner.step), donate_argnums=1, out_shardings=(split, everywhere))
    evaluate = jax.jit(partial(_each_evaluate, course.aligner.evaluate), out_shardings=everywhere)
    feed = _feeding(spec, traces, course, room, mesh, write)
    held = _held(spec, traces, course, room, mesh)

    def advance(state: AlignState, step: int, rate: float):
        return side_by_side(course.frozen, state, feed(step, state.params), rate, reference)

    def judge(params) -> dict[str, np.ndarray]:
        sums = [jax.device_get(evaluate(course.frozen, params, batch)) for batch in held]
        loss, agreement, count = np.sum(sums, axis=0)  # [D] each
        return {"loss": loss / count, "agreement": agreement / count}

    return Programs(lambda: fresh(course.params), advance, judge)


def _choose_rate(course: Course, steps: int, own: Programs, folder: Path) -> float:
    """The candidate whose short run, cooled down at its end, leaves the smallest divergence on the calibrate split."""
    file = folder / f"rate-{course.name}.json"
    if file.exists():
        return json.loads(file.read_text())["chosen"]
    if len(course.rates) == 1:
        return course.rates[0]
    scores = {}
    for rate in tqdm(course.rates, desc=f"{course.name}: learning rate", leave=False):
        state = own.fresh()
        for step in range(min(steps, course.steps)):
            state, _ = own.advance(state, step, schedule(step, steps, rate, SEARCH_WARMUP))
        scores[rate] = float(own.judge(state.params)["loss"].mean())
    chosen = min(scores, key=scores.__getitem__)
    if is_writer():
        write_json(file, {"chosen": chosen, "divergence": {str(rate): score for rate, score in scores.items()}})
    return chosen


def _init(course: Course) -> Callable[[Any], AlignState]:
    """From params, which stay: a step takes the state's buffers for its own."""
    return lambda params: jax.vmap(course.aligner.init)(jax.tree.map(jnp.copy, params))


def _each(step: Callable, frozen, state: AlignState, batch: Batch, rate, reference):
    """One step of every drafter."""
    one = lambda own: step(frozen, own[0], own[1], rate, own[2])
    return jax.lax.map(one, (state, batch, reference), batch_size=_together(batch, frozen or state.params))


def _each_evaluate(evaluate: Callable, frozen, params, batch: Batch):
    one = lambda own: evaluate(frozen, own[0], own[1])
    return jax.lax.map(one, (params, batch), batch_size=_together(batch, frozen or params))


def _together(batch: Batch, weights: Any) -> int | None:
    """Drafters in one product: on accelerators, which small ones do not fill, as many as have logits of 4 GB, else one."""
    if jax.default_backend() == "cpu":
        return None
    places, vocab_size = batch.at[0].size, weights["embed"]["embedding"].shape[-2]
    return max(1, min(len(batch.tokens), LOGITS // (4 * places * vocab_size)))


def _held(spec: Align, traces: Traces, course: Course, room: int, mesh: Mesh) -> list[Batch]:
    """The rows held out, as many at a time as in a step."""
    pack = partial(as_batch, traces, row_tokens=spec.row_tokens, room=room)
    groups = range(0, len(course.held[0]), spec.rows)
    return [_stack([pack(own[at : at + spec.rows]) for own in course.held], mesh) for at in groups]


def _feeding(
    spec: Align, traces: Traces, course: Course, room: int, mesh: Mesh, write: Callable | None
) -> Callable[[int, Any], Batch]:
    """(step, params) -> the step's batch: stored texts, and in its last rows what the drafters now say to those prompts.

    They say it anew every `spec.refresh` steps; steps are fed in order from one at which they do.
    """
    pack = partial(as_batch, row_tokens=spec.row_tokens, room=room)
    stored = spec.rows - rows_of(spec, spec.on_policy)
    given = lambda plan, step: plan[step * spec.rows : step * spec.rows + stored]
    asked = lambda plan, step: plan[step * spec.rows + stored : (step + 1) * spec.rows]
    said: list[tuple[dict[int, int], Texts]] = []

    def feed(step: int, params) -> Batch:
        batches = [pack(traces, given(plan, step)) for plan in course.train]
        if write and step % spec.refresh == 0:
            upto = range(step, min(step + spec.refresh, course.steps))
            wanted = [sorted({i for now in upto for row in asked(plan, now) for i in row}) for plan in course.train]
            texts = (write(course.frozen, params, drafter, own, step) for drafter, own in enumerate(wanted))
            said[:] = [({i: n for n, i in enumerate(own)}, new) for own, new in zip(wanted, texts, strict=True)]
        for drafter, (place, texts) in enumerate(said):
            rows = [[place[i] for i in row] for row in asked(course.train[drafter], step)]
            batches[drafter] = jax.tree.map(lambda *leaves: np.concatenate(leaves), batches[drafter], pack(texts, rows))
        return _stack(batches, mesh)

    return feed


def _stack(batches: list[Batch], mesh: Mesh) -> Batch:
    """Batches of several drafters, `[D, R, ...]`, in their place."""
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
    return sharding.place(stacked, sharding.column_specs(stacked, mesh), mesh)
