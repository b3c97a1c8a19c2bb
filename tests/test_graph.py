"""Token graphs: nodes that end alike are read once, and what they lead to stands behind each of them.

The laws that graphs share with trees are in `test_tree.py`.
"""

import heapq
import random
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_tree import FEW, FEW_OTHER, SLOTS, onward
from toys import prompt_of

from jaxspec.drafters import graph_drafter, tree_drafter
from jaxspec.drafters.beam import search
from jaxspec.drafters.graph import NONE, explore, unroll
from jaxspec.drafters.lm import LMDrafterParams, begin, model

DEPTH, BEAM, NODES, ROWS = 4, 4, 40, 6
OWN = LMDrafterParams(FEW_OTHER)
PROMPT = prompt_of(np.random.default_rng(1).integers(FEW.vocab_size, size=(ROWS, 5)), limit=1)
TEXT = jnp.pad(PROMPT.tokens, ((0, 0), (0, SLOTS - 5)))


def behind_merged_edges(draw: random.Random):
    """Texts go on along window rows that stand behind a merged edge, where there are any."""

    def rows_of(state, draft):
        reached = [np.flatnonzero(row).tolist() for row in np.asarray(state.merged)]
        return [draw.choice(rows or range(31)) for rows in reached]

    return rows_of


def test_a_path_across_merged_edges_is_cached_as_its_own_text_leaves_it():
    """Its nodes were read behind other texts: what is drafted next is what a drafter that begins with the text drafts."""
    crossed = 0
    for state, draft, fresh in onward("graph", behind_merged_edges(random.Random(0)), 4):
        jax.tree.map(np.testing.assert_array_equal, draft, fresh)
        crossed += np.asarray(state.merged).any(1).sum()
    assert crossed > 8


@pytest.fixture(scope="module", params=[0, 1])
def explored(request):
    """r; what a beam met that merges by it, of six rows, the graph, its tree, and the rows behind merged edges."""
    kept = []

    def all_of_it():
        read, say = model(FEW, OWN, None)
        state = begin(FEW, OWN, PROMPT, SLOTS + (DEPTH - 1) * BEAM, jnp.float32)

        def remembered(**settings):
            kept[:] = search(read, say, state.cache, TEXT, PROMPT.length, **settings)
            return kept

        graph, _ = explore(remembered, TEXT, PROMPT.length, depth=DEPTH, beam=BEAM, ancestors=request.param)
        return kept[0], graph, *unroll(graph, NODES, DEPTH)

    return request.param, *jax.tree.map(np.asarray, jax.jit(all_of_it)())


def nodes_of(met, row: int) -> tuple[list[list[int]], list[list[int]]]:
    """Tokens from the text on that lead to each node with children, the text's last token's first, and the slots on its way."""
    paths, ways = [[]], [[]]
    for slot, child in enumerate(met.read[row].tolist()):
        node, place = divmod(child, BEAM)
        paths.append([*paths[node], int(met.tokens[row, node, place])])
        ways.append([*ways[node], slot + 1])
    return paths, ways


def ending(row: int, path: list[int], r: int) -> list[int]:
    return [*PROMPT.tokens[row].tolist(), *path][-(r + 1) :]


def among(ends: list[list[int]], end: list[int], way: list[int], before: int) -> bool:
    """Whether one of the nodes before some node ends so, and is not on the way."""
    return any(ends[node] == end for node in range(1, before) if node not in way)


def test_a_node_is_not_read_again_where_another_could_be(explored):
    """Nodes read again are the greedy chain's, end as one on their own way, or are of a level that has no other children."""
    r, met, *_ = explored
    for row in range(ROWS):
        paths, ways = nodes_of(met, row)
        ends = [ending(row, path, r) for path in paths]
        known = partial(among, ends)
        for node in range(1, len(paths)):
            level = (node - 1) // BEAM
            if not known(ends[node], ways[node], node) or (node - 1) % BEAM == 0:
                continue
            above = range(1 + (level - 1) * BEAM, 1 + level * BEAM) if level else [0]
            children = [(up, [*paths[up], int(token)]) for up in above for token in met.tokens[row, up]]
            assert all(known(ending(row, path, r), ways[up], 1 + (level + 1) * BEAM) for up, path in children)


def test_a_node_is_followed_by_its_own_continuations_or_by_those_of_the_first_that_ends_as_it_does(explored):
    r, met, graph, *_ = explored
    merged = 0
    for row in range(ROWS):
        paths, ways = nodes_of(met, row)
        for node, place in np.ndindex(len(paths), BEAM):
            path, child = [*paths[node], int(met.tokens[row, node, place])], node * BEAM + place
            alike = [
                own
                for own in range(1, len(paths))
                if own not in ways[node] and ending(row, path, r) == ending(row, paths[own], r)
            ]
            own = np.flatnonzero(met.read[row] == child)
            expected = own[0] + 1 if len(own) else alike[0] if alike else NONE
            assert graph.follows[row, node, place] == expected
            assert graph.merged[row, node, place] == (not len(own) and bool(alike))
            merged += graph.merged[row, node, place]
    assert merged > ROWS


def best_first(graph, row: int) -> dict[tuple[int, ...], bool]:
    """The unrolled graph's likeliest paths, the greedy chain's first, and whether each leads across a merged edge."""
    found, queue = {}, []

    def open_up(path, score, node, across, greedy):
        for place in range(BEAM) if node != NONE else ():
            first = greedy and place == 0 and len(path) < DEPTH
            total = score + float(graph.gain[row, node, place])
            edge = graph.follows[row, node, place], across or bool(graph.merged[row, node, place])
            own = (*path, int(graph.tokens[row, node, place]))
            heapq.heappush(queue, (-np.inf if first else -total, own, total, *edge, first, across))

    open_up((), 0.0, 0, False, True)
    while len(found) < NODES:
        _, path, score, node, later, greedy, across = heapq.heappop(queue)
        found[path] = across
        open_up(path, score, node, later, greedy)
    return found


def test_the_tree_is_the_likeliest_of_the_graphs_paths(explored):
    """Some of them across merged edges."""
    _, _, graph, draft, merged = explored
    for row in range(ROWS):
        paths = [()]
        for parent, token in zip(draft.parents[row], draft.tokens[row], strict=True):
            paths.append((*paths[parent], int(token)))
        assert dict(zip(paths[1:], merged[row, 1:].tolist(), strict=True)) == best_first(graph, row)
    assert merged.any()


@pytest.mark.slow
def test_where_nothing_ends_alike_a_graph_is_a_tree():
    drafts = []
    for make in (tree_drafter, partial(graph_drafter, ancestors=DEPTH + 5)):
        own = make(FEW, NODES, depth=DEPTH, beam=BEAM)
        propose = lambda own=own: own.propose(OWN, own.init(OWN, PROMPT, SLOTS), TEXT, PROMPT.length, None, None)[0]
        drafts.append(jax.jit(propose)())
    jax.tree.map(np.testing.assert_array_equal, *drafts)


def test_a_graph_needs_a_beam_that_meets_its_nodes():
    with pytest.raises(ValueError, match="7 nodes cannot be: 2 levels need as many, and a beam of 2 meets 6"):
        graph_drafter(FEW, 7, depth=2, beam=2)
