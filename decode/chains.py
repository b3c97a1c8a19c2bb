"""The programs of a pool as chains: steps that follow one another on the device, each fed by what the one before said.

So neither dispatch nor the host is in a step, and XLA can leave nothing out, nor move more before the loop than it does for the
loop that decodes. Steps of the models alone stay at one place of the cache; iterations go on as the engine's do.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from decode.subjects import Drafting, Load, Subject
from jaxspec import pooled, roofline, verify
from jaxspec.attention import fastest
from jaxspec.drafters import lm_drafter, silent_drafter
from jaxspec.requests import Request, as_prompt, as_sampling, bucket_of
from jaxspec.roofline import Work
from jaxspec.slots import empty_slots, pool_features, programs
from jaxspec.target import LMState, lm_target
from jaxspec.transformer import LMConfig, empty_cache
from jaxspec.types import Drafter, Prompt, SpecParams, Target

NEVER = (-1,)  # a stop token that no text has: rows are tested for it and go on
SAMPLED = {"temperature": 1.0, "top_k": 50, "top_p": 0.9}


class Chain(NamedTuple):
    """A program in a chain.

    run: (steps) -> None, when they are done; work: the least that a step must do; most: steps that there is room for.
    """

    run: Callable[[int], object]
    work: Work
    most: int = 1 << 20


def scoring(config: LMConfig, dtype: Any, params: dict, rows: int, width: int, load: Load) -> Chain:
    """A model's call for a window of `width` columns: the target's autoregressive step or verification, the drafter's step."""
    model = _target(config, dtype)

    @jax.jit
    def program(params, state: LMState, window: Array, steps: Array) -> Array:
        def step(_, carry):
            scores, state = model.score(params, carry[0], carry[1], None, None)
            return state, _likeliest(scores.logits)

        return jax.lax.fori_loop(0, steps, step, (state, window))[1]

    state = LMState(empty_cache(config, rows, load.room, dtype), jnp.full(rows, load.context, jnp.int32))
    start = jnp.ones((rows, width), jnp.int32)
    work = roofline.window(config, dtype, rows=rows, width=width, cached=load.context)
    return Chain(lambda steps: jax.block_until_ready(program(params, state, start, steps)), work)


def reading(own: Subject, load: Load) -> Chain:
    """The target's prefill of one prompt that fills its bucket, with the router's features."""
    model, bucket = _target(own.shape, own.dtype), load.bucket

    @jax.jit
    def program(params, tokens: Array, steps: Array):
        none = jnp.zeros(1, jnp.int32)
        prompt = Prompt(tokens, none + bucket, jax.random.split(jax.random.key(0), 1), none, none, none)

        def step(_, carry):
            tokens, _ = carry
            state, features = model.init(params, prompt._replace(tokens=tokens), bucket)
            moved = jnp.argmax(pool_features(features, prompt.length), axis=-1)
            return (tokens + moved[:, None]) % own.shape.vocab_size, state

        empty = LMState(empty_cache(own.shape, 1, bucket, own.dtype), prompt.length)
        return jax.lax.fori_loop(0, steps, step, (tokens, empty))

    start = jnp.ones((1, bucket), jnp.int32)
    work = roofline.window(own.shape, own.dtype, rows=1, width=bucket, cached=0, scored=0)
    return Chain(lambda steps: jax.block_until_ready(program(own.read, start, steps)), work)


def models(own: Subject, drafting: Drafting, load: Load) -> Chain:
    """An iteration's calls of drafter and target, and nothing between them but what feeds the next."""
    target, drafter = _target(own.shape, own.dtype), _drafter(own, load.number)

    @jax.jit
    def program(params: SpecParams, tokens: Array, state: tuple, length: Array, steps: Array) -> Array:
        def step(_, carry):
            tokens, (drafted, scored) = carry
            draft, drafted = drafter.propose(params.drafter, drafted, tokens, length, None, None)
            last = jnp.take_along_axis(tokens, length[:, None] - 1, axis=1)
            window = jnp.concatenate([last, draft.tokens], axis=1)
            scores, scored = target.score(params.target, scored, window, None, None)
            said = jnp.sum(_likeliest(scores.logits), axis=1) % own.shape.vocab_size  # every column feeds the next
            return tokens.at[:, load.context - 1].set(said), (drafted, scored)

        return jax.lax.fori_loop(0, steps, step, (tokens, state))[0]

    params, filled = _filled(own, drafter, verify.greedy, drafting, load, {})
    tokens, length = filled.spec.tokens, filled.spec.length
    state = filled.spec.drafter, filled.spec.target
    return Chain(
        lambda steps: jax.block_until_ready(program(params, tokens, state, length, steps)), _work(own, drafting, load)
    )


def iterations(own: Subject, drafting: Drafting | None, load: Load, sampling: dict[str, Any] | None = None) -> Chain:
    """Whole iterations as the engine's own program runs them: draft, verify, accept, commit, stop; None drafts nothing.

    Args:
        sampling: settings of the rows' requests, for p/q rejection; None decodes greedily.
    """
    rule = verify.rejection if sampling else verify.greedy
    drafter = _drafter(own, load.number) if drafting else silent_drafter(pooled.idle_width() - 1)
    program = programs(_target(own.shape, own.dtype), drafter, rule, stop_tokens=NEVER).chunk
    filled = cache(lambda: _filled(own, drafter, rule, drafting, load, sampling or {}))
    copied = jax.jit(lambda state: jax.tree.map(jnp.copy, state))  # the program takes its state for itself

    def run(steps: int) -> Array:
        params, state = filled()
        return jax.block_until_ready(program(params, copied(state), np.int32(0), np.int32(steps)).spec.length)

    idle = roofline.window(
        own.shape, own.dtype, rows=own.slots, width=pooled.idle_width(), cached=load.context, scored=1
    )
    work = _work(own, drafting, load) if drafting else idle
    return Chain(run, work, load.budget // (drafter.num_nodes + 1))


def _target(config: LMConfig, dtype: Any) -> Target:
    """A model as engines on one device have it."""
    return lm_target(config, dtype, attend=fastest(False, dtype))


def _drafter(own: Subject, number: int) -> Drafter:
    known = {"vocab_size": own.shape.vocab_size, "dtype": own.dtype, "attend": fastest(False, own.dtype)}
    return lm_drafter(own.draft, number, **known)


def _filled(own: Subject, drafter: Drafter, rule: Any, drafting: Drafting | None, load: Load, sampling: dict[str, Any]):
    """Parameters, and slots whose rows have all read one prompt of `context` tokens and draft by their routes."""
    target, known = _target(own.shape, own.dtype), {"slots": own.slots, "room": load.room, "sampled": bool(sampling)}
    fill = programs(target, drafter, rule, stop_tokens=NEVER)
    params = SpecParams(own.target, drafting.params if drafting else ())
    ids = tuple(np.random.default_rng(0).integers(0, own.shape.vocab_size, load.context).tolist())
    requests = [Request(ids=ids, max_new_tokens=load.budget, number=i, **sampling) for i in range(own.slots)]
    routes = drafting.routes if drafting else (-1,) * own.slots
    prompt = as_prompt(requests, own.slots, bucket_of(load.context), routes)
    row, *_ = fill.prefill(own.read, prompt.tokens[:1], prompt.length[:1])
    state = jax.tree.map(lambda leaf: jnp.repeat(leaf, own.slots, axis=0), row)
    empty = jax.jit(empty_slots(target, drafter, rule, **known))(params)
    drawn = as_sampling(requests, own.slots, own.shape.vocab_size) if sampling else None
    return params, fill.admit(params, empty, prompt, state, drawn, np.arange(own.slots, dtype=np.int32))


def _work(own: Subject, drafting: Drafting, load: Load) -> Work:
    """The least that an iteration must do."""
    known = {"rows": own.slots, "cached": load.context}
    drafted = roofline.drafting(own.draft, own.dtype, number=load.number, adapters=drafting.adapters, **known)
    return roofline.together([drafted, roofline.window(own.shape, own.dtype, width=load.number + 1, **known)])


def _likeliest(logits: Array) -> Array:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
