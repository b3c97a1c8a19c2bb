"""The drafter that looks up: it copies from the right place, and where the next token hangs on the last it is never wrong."""

import jax.numpy as jnp
import numpy as np
import pytest
from toys import prompt_of, random_table, table_target

from jaxspec import verify
from jaxspec.drafters import ngram_drafter
from jaxspec.speculate import run, speculator
from jaxspec.types import SpecParams


def draft(text, k=4, room=24, **settings):
    """What is drafted after `text`, in a buffer with leavings behind it."""
    tokens = np.full((1, room), text[0], np.int32)
    tokens[0, : len(text)] = text
    own, _ = ngram_drafter(k, **settings).propose((), (), jnp.asarray(tokens), jnp.array([len(text)]), None, None)
    return own.tokens[0, : int(own.num_drafted[0])].tolist()


@pytest.mark.parametrize(
    ("text", "settings", "expected"),
    [
        ([1, 2, 3, 4, 5, 6, 1, 2], {}, [3, 4, 5, 6]),
        ([1, 2, 8, 9, 7, 2, 6, 5, 1, 2], {}, [8, 9, 7, 2]),  # two agreeing tokens beat a later place with one
        ([3, 1, 5, 1, 6, 7, 1], {}, [6, 7, 1, 6]),  # the latest of equals, and then its own beginning
        ([1, 2, 1, 2, 1], {}, [2, 1, 2, 1]),
        ([5, 5], {}, [5, 5, 5, 5]),
        ([3, 7, 9, 3, 3], {}, [3, 3, 3, 3]),  # nothing stands before the first place, not the end of the buffer either
        ([1, 2, 3, 4], {}, []),
        ([4], {}, []),
        ([1, 2, 3, 9, 2], {"shortest": 2}, []),
        ([1, 2, 3, 9, 1, 2], {"shortest": 2}, [3, 9, 1, 2]),
        ([1, 2, 3, 4, 6, 2, 3, 5, 6, 1, 2, 3], {"longest": 2}, [5, 6, 1, 2]),
        ([1, 2, 3, 4, 6, 2, 3, 5, 6, 1, 2, 3], {"longest": 3}, [4, 6, 2, 3]),
    ],
)
def test_it_copies_what_followed(text, settings, expected):
    assert draft(text, **settings) == expected


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("token", range(4))
def test_where_the_next_token_hangs_on_the_last_nothing_is_rejected(token, k):
    """Greedy text of a first-order model repeats itself for ever once it has said a token twice."""
    spec = speculator(table_target(), ngram_drafter(k), verify.greedy, stop_tokens=())
    params = SpecParams(jnp.asarray(random_table(3, 12)), ())
    state = spec.init(params, prompt_of([[token]], limit=40), (), None, 41 + spec.num_nodes + 1)
    state, rounds = run(spec.step, lambda stats, info: stats + 1, params, state, 0)
    text = state.tokens[0, : int(state.length[0])].tolist()
    fresh = len(set(text))  # each of them a round of its own, and the first repetition too
    assert len(text) == 41 and rounds == fresh + -(-(41 - fresh - 1) // (k + 1))
