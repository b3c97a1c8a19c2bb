"""Where two decodings of one prompt part, and by how little the target preferred one token to the other there."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxspec.requests import Request, bucket_of
from jaxspec.store.pool import Pool
from jaxspec.transformer import forward, unembed


def first_difference(pool: Pool, request: Request, a: Sequence[int], b: Sequence[int]) -> dict[str, Any] | None:
    """`position` in the output, the two `tokens`, their `logits` and the `gap` between these; None where a equals b.

    The gap is in steps of bfloat16 at the logit's size, whatever the pool's dtype; the logits come from one pass over the
    whole text. Where one text only ends before the other there are no two tokens.
    """
    if list(a) == list(b):
        return None
    at = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    if at >= min(len(a), len(b)):
        return {"position": at, "tokens": None, "logits": None, "gap": None}
    logits = _next_logits(pool, [*request.ids, *a[:at]])
    pair = [float(logits[a[at]]), float(logits[b[at]])]
    step = float(np.spacing(np.array(max(map(abs, pair)), jnp.bfloat16)))
    return {"position": at, "tokens": [a[at], b[at]], "logits": pair, "gap": abs(pair[0] - pair[1]) / step}


def _next_logits(pool: Pool, ids: Sequence[int]) -> np.ndarray:
    tokens = np.zeros((1, bucket_of(len(ids))), np.int32)
    tokens[0, : len(ids)] = ids
    target = pool.pair.target
    hidden = forward(target.config, target.params, jnp.asarray(tokens))[:, len(ids) - 1]
    return np.asarray(unembed(target.config, target.params, hidden))[0]
