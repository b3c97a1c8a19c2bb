"""The prompt classifier: a Flax MLP from the target's pooled prefill features to tasks; and what follows from its answer.

The features are paid for by the prefill that happens anyway, so routing costs one small product a prompt. A task's own
drafter is one choice; another is whichever drafter and draft length promise the most tokens per second, by what each had
accepted on each task and by what a round of each length takes on the device.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

TRUNK = -1  # the route of what adapters belong on, which is the base drafter unless it was trained first
ADAPTIVE = -2  # the route of trigram tables where they are asked for by name, for all prompts of a job or for none


class RouterParams(NamedTuple):
    """Features' mean and deviation `[H]` on the train split, and the MLP's weights."""

    mean: Array
    deviation: Array
    mlp: dict


class _MLP(nnx.Module):
    def __init__(self, features: int, hidden: int, tasks: int, rngs: nnx.Rngs):
        self.inner = nnx.Linear(features, hidden, rngs=rngs)
        self.outer = nnx.Linear(hidden, tasks, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.outer(jax.nn.gelu(self.inner(x)))


def init(features: np.ndarray, hidden: int, tasks: int, seed: int) -> RouterParams:
    """A fresh router for features like `features [N, H]`, which also set its scale."""
    mlp = nnx.to_pure_dict(nnx.state(_MLP(features.shape[1], hidden, tasks, nnx.Rngs(seed))))
    deviation = np.maximum(features.std(0), 1e-6)
    return RouterParams(jnp.asarray(features.mean(0)), jnp.asarray(deviation), mlp)


def abstract(features: int, hidden: int, tasks: int) -> RouterParams:
    """Shapes of a router's parameters."""
    return jax.eval_shape(lambda: _abstract(features, hidden, tasks))


def probabilities(params: RouterParams, features: Array) -> Array:
    """`[B, H]` pooled prefill features -> `[B, tasks]` probabilities of the tasks."""
    return jax.nn.softmax(_logits(params, features), axis=-1)


def standardised(params: RouterParams, features):
    """Features `[N, H]` in deviations from the mean of those that the router was trained on."""
    return (features - params.mean) / params.deviation


def choose(probability: np.ndarray, fallback_below: float) -> np.ndarray:
    """Routes `[B]`: the likeliest task, or TRUNK where it is less likely than `fallback_below`."""
    likeliest = probability.argmax(-1)
    return np.where(probability.max(-1) < fallback_below, TRUNK, likeliest)


def runner_up(probability: np.ndarray, drafters: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Routes `[B]` of the likeliest task that another drafter serves than `first [B]`; the same where none does.

    Args:
        drafters: `[tasks]` the route that serves each.
    """
    others = np.where(drafters == first[:, None], -1.0, probability)
    return np.where(others.max(-1) < 0, first, drafters[others.argmax(-1)])


def token_seconds(acceptance_length: np.ndarray, round_seconds: np.ndarray) -> np.ndarray:
    """Expected seconds a token: `[D, T, K]` tokens a round by drafter, task and draft length, `[K]` -> `[D, T, K]`."""
    return round_seconds / acceptance_length


def fastest(probability: np.ndarray, seconds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Drafter `[B]` and draft length `[B]`, as indices of `seconds [D, T, K]`, of the least expected seconds a token.

    Args:
        probability: `[B, T]` of the tasks, so that a prompt between tasks gets what serves both.
        seconds: infinite, on all tasks, where a drafter does not draft so many tokens.
    """
    never = np.isinf(seconds)
    expected = np.einsum("bt,dtk->bdk", probability, np.where(never, 0.0, seconds))
    expected = np.where(never.any(1), np.inf, expected)  # zero times infinity would be no number
    best = expected.reshape(len(expected), -1).argmin(-1)
    return np.unravel_index(best, expected.shape[1:])


def train(
    params: RouterParams,
    features: np.ndarray,
    task: np.ndarray,
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    seed: int,
    mixup: float = 0.0,
) -> RouterParams:
    """Cross entropy to the clusters by AdamW, inputs perturbed a little so that the MLP does not trust rare directions.

    Args:
        features: `[N, H]` of the train split; task: `[N]` their clusters.
        mixup: share of the steps in which prompts are mixed in pairs, see `mixed_loss`, by a weight drawn from Beta(1/2, 1/2).
    """
    tx = optax.adamw(optax.cosine_decay_schedule(learning_rate, steps), weight_decay=1e-2)
    inputs, labels = jnp.asarray(features), jnp.asarray(task)
    batch, draw = min(batch, len(task)), np.random.default_rng(seed)
    weights = np.where(draw.random(steps) < mixup, draw.beta(0.5, 0.5, steps), 1.0).astype(np.float32)

    def loss(mlp, *of):
        return mixed_loss(params._replace(mlp=mlp), *of)

    def step(carry, drawn):
        (mlp, opt), (key, weight) = carry, drawn
        pick_key, noise_key = jax.random.split(key)
        rows = jax.random.randint(pick_key, (batch,), 0, len(task))
        noise = 0.1 * params.deviation * jax.random.normal(noise_key, (batch, features.shape[1]))
        value, grads = jax.value_and_grad(loss)(mlp, inputs[rows] + noise, labels[rows], weight)
        updates, opt = tx.update(grads, opt, mlp)
        return (optax.apply_updates(mlp, updates), opt), value

    keys = jax.random.split(jax.random.key(seed), steps)
    fit = jax.jit(lambda carry: jax.lax.scan(step, carry, (keys, weights)))
    (mlp, _), _ = fit((params.mlp, tx.init(params.mlp)))
    return params._replace(mlp=mlp)


def mixed_loss(params: RouterParams, features: Array, task: Array, weight: Array) -> Array:
    """Mean cross entropy (nats) of a batch `[B, H]` whose rows, and tasks `[B]` alike, are mixed with the row before each.

    Args:
        weight: of a row itself; at 1 nothing is mixed.

    Source: mixup, https://arxiv.org/abs/1710.09412; of kept and new tasks' features https://arxiv.org/abs/2311.14756.
    """
    before = lambda own: jnp.roll(own, 1, axis=0)
    logits = _logits(params, weight * features + (1 - weight) * before(features))
    nats = lambda label: optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()
    return weight * nats(task) + (1 - weight) * nats(before(task))


def _logits(params: RouterParams, features: Array) -> Array:
    x = standardised(params, features)
    hidden, tasks = params.mlp["inner"]["kernel"].shape[1], params.mlp["outer"]["kernel"].shape[1]
    graph, _ = nnx.split(nnx.eval_shape(lambda: _MLP(x.shape[-1], hidden, tasks, nnx.Rngs(0))))
    return nnx.merge(graph, nnx.State(params.mlp))(x)


def _abstract(features: int, hidden: int, tasks: int) -> RouterParams:
    mlp = nnx.to_pure_dict(nnx.state(_MLP(features, hidden, tasks, nnx.Rngs(0))))
    return RouterParams(jnp.zeros(features), jnp.zeros(features), mlp)
