"""Token graphs: nodes that end alike are read once, what is reused is unrolled rightly, and no cache keeps what it was read as.

The laws that graphs share with trees are in `test_tree.py`.
"""

import heapq
import itertools
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_decoding import NEAR, PARAMS, PROMPTS, TARGET, answer, engine, plain_greedy
from test_lossless import LAWS, emitted, every_draft, language, likelihoods, texts
from test_tree import OWN, SLOTS, log_q, rounds_of

from jaxspec import verify
from jaxspec.drafters import graph_drafter, tree_drafter
from jaxspec.drafters.beam import search
from jaxspec.drafters.graph import NONE, Graph, explore, unroll
from jaxspec.drafters.lm import LMDrafterParams, model
from jaxspec.transformer import prefill

NODES, DEPTH, BEAM = 14, 3, 3


@pytest.fixture(scope="module")
def rounds():
    """Six rounds of graphs that merge by the token alone."""
    return rounds_of(graph_drafter(TARGET, NODES, depth=DEPTH, beam=BEAM, ancestors=0), OWN, 6)


def crossed(infos) -> np.ndarray:
    """`[rounds, B]` whether the accepted path has a node behind a merged edge."""
    found = []
    for info in infos:
        own = np.take_along_axis(np.asarray(info.drafter.merged), np.asarray(info.verdict.path), axis=1)
        found.append((own & (np.arange(NODES + 1) <= np.asarray(info.num_accepted)[:, None])).any(1))
    return np.array(found)


def test_the_drafters_cache_holds_the_text_also_where_an_accepted_path_had_been_read_behind_another(rounds):
    """When it drafts again, all of the text but what it drafts behind."""
    states, infos = rounds
    assert crossed(infos[:-1]).any()
    read = jax.jit(lambda state: prefill(TARGET, NEAR, state.tokens, state.length, SLOTS, jnp.float32)[1])
    for state, info in zip(states, infos):
        fresh, length = read(state), np.asarray(state.length)
        for ours, theirs in zip(jax.tree.leaves(info.drafter.model.cache), jax.tree.leaves(fresh), strict=True):
            for row, number in enumerate(length):
                np.testing.assert_allclose(ours[row, :, :number], theirs[row, :, :number], atol=1e-4)
