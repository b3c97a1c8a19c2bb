"""One drafter made of many: controls for routing, and a way to save memory.

All of it works on the tasks' updates (`adapters.updates`), what each specialist adds to the base drafter: by the path of the
leaf `[tasks, in, out]` float32, and `[tasks, out]` where a whole specialist's leaf is a vector. The result is one such update
without the axis of tasks.
"""

from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax import Array

Updates = dict[str, Array]


def task_arithmetic(tau: Updates, scale: float) -> Updates:
    """The sum of all updates times a coefficient (Ilharco et al. 2023); 1 / tasks is their average."""
    return jax.tree.map(lambda leaf: scale * leaf.sum(0), tau)


def awd(tau: Updates, *, steps: int = 300, weight: float = 0.1, rate: float = 0.01) -> Updates:
    """Adaptive weight disentanglement (Xiong et al., arXiv 2411.18729): updates less what is redundant among them.

    One vector, shared by all tasks, is learned by gradient descent so that what is left of the updates is orthogonal: the mean
    absolute cosine of all pairs, and `weight` times the vector's norm. A cosine is taken over all kernels together; lengths are
    in units of the updates' mean norm, so that `weight` and `rate` mean the same for updates of any size.
    """
    leaves, tree = jax.tree.flatten(tau)
    tasks = leaves[0].shape[0]
    flat = jnp.concatenate([leaf.reshape(tasks, -1) for leaf in leaves], axis=1)
    unit = jnp.maximum(jnp.linalg.norm(flat, axis=1).mean(), 1e-12)
    others = ~jnp.eye(tasks, dtype=bool)

    def loss(delta):
        left = flat / unit - delta
        norm = jnp.linalg.norm(left, axis=1)
        cosine = left @ left.T / jnp.maximum(norm[:, None] * norm, 1e-12)
        absolute = cosine * jnp.sign(jax.lax.stop_gradient(cosine))  # whose gradient at zero is zero
        size = jnp.sum(jnp.square(delta))
        length = jnp.where(size > 0, jnp.sqrt(jnp.where(size > 0, size, 1.0)), 0.0)  # and so is its
        return jnp.sum(jnp.where(others, absolute, 0.0)) / max(tasks * (tasks - 1), 1) + weight * length

    def descend(delta, _):
        return delta - rate * jax.grad(loss)(delta), None

    delta, _ = jax.jit(partial(jax.lax.scan, descend, length=steps))(jnp.zeros(flat.shape[1]))
    sizes = [leaf[0].size for leaf in leaves]
    parts = jnp.split(flat - unit * delta, jnp.cumsum(jnp.array(sizes))[:-1].tolist(), axis=1)
    return tree.unflatten([part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)])


def doge(
    tau: Updates, *, scale: float = 0.07, kept: float = 0.3, divisor: int = 6, steps: int = 400, rate: float = 1e-4
) -> Updates:
    """DOGE (Wei et al., arXiv 2501.01230): a shared correction, learned outside of the subspace that the tasks share.

    Every task has the coefficient `scale` over its update's norm, a kernel at a time; of each update plus the correction only
    the `kept` share of places counts where the update, over all kernels, is largest. Vectors, which span nothing, are averaged.

    Args:
        divisor: the shared subspace has the kernel's smaller side over this many dimensions.
    """
    tasks = jax.tree.leaves(tau)[0].shape[0]
    magnitude = jnp.concatenate([jnp.abs(leaf).reshape(tasks, -1) for leaf in jax.tree.leaves(tau)], axis=1)
    least = jnp.quantile(magnitude, 1 - kept, axis=1)

    def merged(leaf: Array) -> Array:
        if leaf.ndim < 3:
            return leaf.mean(0)
        share = scale / jnp.maximum(jnp.linalg.norm(leaf, axis=(1, 2)), 1e-12)
        delta = _correction(leaf, share, divisor, steps, rate)
        mask = jnp.abs(leaf) >= least[:, None, None]
        return jnp.einsum("t,tio->io", share, (leaf + delta) * mask)

    return jax.tree.map(merged, tau)


@partial(jax.jit, static_argnums=(2, 3))
def _correction(leaf: Array, share: Array, divisor: int, steps: int, rate: float) -> Array:
    """The correction `[in, out]` of one kernel, by Adam, its gradient free of the shared subspace.

    A kernel here is `[in, out]`, in the paper `[out, in]`: its left vectors span `out`, and its loss sums over `in` first.
    """
    tasks, width_in, width_out = leaf.shape
    rank = min(width_in, width_out)
    left = lambda matrix, number: jnp.linalg.svd(matrix, full_matrices=False)[0][:, :number]
    of_task = jax.vmap(lambda own: left(own.T, max(rank // tasks, 1)))(leaf)
    shared = left(jnp.moveaxis(of_task, 0, 1).reshape(width_out, -1), max(rank // divisor, 1))
    tx = optax.adam(rate)

    def loss(delta):
        whole = jnp.einsum("t,tio->io", share, leaf + delta)
        return jnp.sum(jnp.square(jnp.sum(leaf * (leaf - whole), axis=1)))

    def descend(carry, _):
        delta, opt = carry
        gradient = jax.grad(loss)(delta)
        step, opt = tx.update(gradient - gradient @ shared @ shared.T, opt)
        return (optax.apply_updates(delta, step), opt), None

    start = jnp.zeros((width_in, width_out))
    final, _ = jax.lax.scan(descend, (start, tx.init(start)), length=steps)
    return jnp.asarray(final[0])
