"""Language models about which everything is known: a table of logits is a model, its distributions are exact."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.sampling import draw, log_probs
from jaxspec.speculate import run
from jaxspec.types import Draft, Drafter, Prompt, Sampling, Scores, SpecParams, SpecState, Target

SETTINGS = {
    "plain": Sampling(np.ones(1, np.float32)),
    "cold": Sampling(np.full(1, 0.3, np.float32)),
    "greedy": Sampling(np.zeros(1, np.float32)),
    "top-k": Sampling(np.ones(1, np.float32), top_k=np.full(1, 2, np.int32)),
    "top-p": Sampling(np.full(1, 0.8, np.float32), top_p=np.full(1, 0.6, np.float32)),
}


def table_target() -> Target:
    """Parameters are `[V, V]` logits: the next token depends on the last one alone. No state."""

    def score(table, state, window, parents, sampling):
        logits = table[window]
        return Scores(log_probs(logits, sampling), logits, logits), state

    features = lambda table, prompt: table[prompt.tokens]
    return Target(
        lambda table, prompt, slots: ((), features(table, prompt)), score, lambda state, verdict, parents=None: state
    )


def table_drafter(num_nodes: int, deterministic: bool = False) -> Drafter:
    """Drafts with a table of its own: sampled from it, or its likeliest token with no q at all."""

    def propose(table, state, tokens, length, noise, sampling):
        last = jnp.take_along_axis(tokens, length[:, None] - 1, 1)[:, 0]
        drafted, log_qs = [], []
        for node in range(num_nodes):
            log_q = log_probs(table[last], sampling)
            likeliest = deterministic or sampling is None
            sampled = jnp.argmax(log_q, -1) if likeliest else jax.vmap(draw)(noise(node), log_q)
            last = sampled.astype(jnp.int32)
            drafted.append(last)
            log_qs.append(log_q)
        log_q = None if deterministic or sampling is None else jnp.stack(log_qs, 1)
        count = jnp.full(length.shape, num_nodes, jnp.int32)
        return Draft(jnp.stack(drafted, 1), count, log_q), state

    return Drafter(num_nodes, lambda table, prompt, slots: (), propose, lambda params, state, verdict, scores: state)


def table_tree(parents: tuple[int, ...]) -> Drafter:
    """Drafts a tree of window rows: a row's children are its likeliest tokens, in order."""

    def propose(table, state, tokens, length, noise, sampling):
        rows = [jnp.take_along_axis(tokens, length[:, None] - 1, 1)[:, 0]]
        for node, parent in enumerate(parents):
            rank = parents[:node].count(parent)
            rows.append(jnp.argsort(-table[rows[parent]], axis=-1)[:, rank].astype(jnp.int32))
        batch, nodes = length.shape[0], len(parents)
        tree = jnp.broadcast_to(jnp.array(parents, jnp.int32), (batch, nodes))
        return Draft(jnp.stack(rows[1:], 1), jnp.full(batch, nodes, jnp.int32), None, tree), state

    return Drafter(len(parents), lambda table, prompt, slots: (), propose, lambda params, state, verdict, scores: state)


def every_setting(rows: int, vocab: int) -> Sampling:
    """Rows of all `SETTINGS` in turn, in one batch."""
    keep_all = Sampling(np.ones(1, np.float32), np.full(1, vocab, np.int32), np.ones(1, np.float32))
    whole = [[kept if own is None else own for own, kept in zip(each, keep_all)] for each in SETTINGS.values()]
    return Sampling(*(jnp.resize(jnp.concatenate(column), rows) for column in zip(*whole)))


def decode(spec, target, drafter, prompt: Prompt, sampling: Sampling | None) -> SpecState:
    """The state in which every row has ended; `target` and `drafter` are the parameters of toys."""
    params = SpecParams(*jax.tree.map(jnp.asarray, (target, drafter)))
    slots = prompt.tokens.shape[1] + int(prompt.limit.max()) + spec.num_nodes + 1
    state = spec.init(params, prompt, (), sampling, slots)
    return _loop(spec)(params, state)


@cache
def _loop(spec):
    return jax.jit(lambda params, state: run(spec.step, lambda stats, info: stats, params, state, ())[0])


def prompt_of(tokens, *, limit: int, seed: int = 0, draft_limit: int = 99, route=None) -> Prompt:
    """A batch of equally long prompts `[B, P]`; row i has request number i."""
    tokens = jnp.asarray(tokens, jnp.int32)
    batch, length = tokens.shape
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(batch))
    full = lambda value: jnp.full(batch, value, jnp.int32)
    return Prompt(
        tokens, full(length), keys, full(limit), full(draft_limit), full(-1) if route is None else jnp.asarray(route)
    )


def random_table(seed: int, vocab: int, sharpness: float = 1.5) -> np.ndarray:
    """Logits of a random first-order model."""
    return (sharpness * np.random.default_rng(seed).normal(size=(vocab, vocab))).astype(np.float32)
