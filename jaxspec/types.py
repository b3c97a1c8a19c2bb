"""The vocabulary of jaxspec: every array that crosses a module boundary is named here.

Axis letters, the same in every annotation and docstring:

    B  rows: requests decoded together, each with its own length, key, stop, adapter
    N  nodes drafted in a round (static); a chain of N = K tokens unless `parents` says otherwise
    W  window rows scored in a round: the last token and its drafts, N + 1 (static)
    P  prompt bucket (static)
    L  token buffer: prompt bucket, budget and W slots of slack (static)
    V  vocabulary
    H  width of the target's features

`p` is the target's next-token distribution and `q` the drafter's, both after temperature, top-k and top-p and both
float32. Names that start with `log_` are natural logarithms normalised over V; un-normalised scores are `logits`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from jax import Array

State = Any
Params = Any


class Sampling(NamedTuple):
    """How a row's distribution is made from logits; None in place of the whole means greedy for all rows.

    temperature: `[B]`, 0 is greedy.
    top_k: `[B]` int, V or more keeps all; None when no row uses it.
    top_p: `[B]`, 1 keeps all; None when no row uses it.
    """

    temperature: Array
    top_k: Array | None = None
    top_p: Array | None = None


class Prompt(NamedTuple):
    """What a round of requests starts from.

    tokens: `[B, P]` right-padded prompts.
    length: `[B]` their lengths, at least 1.
    key: `[B]` one random stream a row, from seed and request id.
    limit: `[B]` most tokens to emit.
    draft_limit: `[B]` most tokens to draft a round; 0 decodes the row autoregressively in the same program.
    route: `[B]` which adapter of the bank drafts for the row.
    features: what the drafter's `sees` leaves of the target's hidden states.
    """

    tokens: Array
    length: Array
    key: Array
    limit: Array
    draft_limit: Array
    route: Array
    features: Any = None


class Draft(NamedTuple):
    """What a drafter proposes for one round.

    tokens: `[B, N]` proposed tokens.
    num_drafted: `[B]` how many of them count, 0..N: the first, among which a node's parent must be.
    log_q: `[B, N, V]` distribution that each was drawn from; None when the proposal is deterministic.
    parents: `[B, N]` window row of each node's parent, which stands before it; None for a chain.
    """

    tokens: Array
    num_drafted: Array
    log_q: Array | None = None
    parents: Array | None = None


class Scores(NamedTuple):
    """What the target says of a window.

    log_p: `[B, W, V]` distribution of the token after each window row.
    logits: `[B, W, V]` the float32 logits that it came from.
    features: `[B, W, H]` the target's last hidden states.
    """

    log_p: Array
    logits: Array
    features: Array


class Verdict(NamedTuple):
    """What the target makes of a draft.

    tokens: `[B, W]` tokens to emit; only the first `num_emitted` are real.
    num_emitted: `[B]` 1..W, or 0 for a finished row.
    num_accepted: `[B]` drafted tokens among those that the rule accepted, 0..N.
    path: `[B, W]` window row that scored each emitted token.
    """

    tokens: Array
    num_emitted: Array
    num_accepted: Array
    path: Array


class Drafter(NamedTuple):
    """A way of drafting: pure functions over a state of its own, whose leaves all have rows first.

    num_nodes: N, fixed when the drafter is built.
    init: (params, prompt: Prompt) -> state.
    propose: (params, state, tokens `[B, L]`, length `[B]`, noise, sampling) -> (Draft, state), where `noise(step)`, for a
        Python or a traced int, gives the `[B]` keys to draw the token with that lies `step` places after the last one,
        0..N - 1. The rule in force makes them; a drafter that draws with them suits every rule.
    commit: (params, state, verdict, scores) -> state, rewound to what was emitted.
    num_calls: times that a round reads the drafter's weights, one after another.
    sees: the target's hidden states of prompts `[B, P, H]` -> what `init` finds of them as `prompt.features`.
    meanwhile: (params, state) -> state, what it does between proposal and verdict, of which it knows nothing yet; by default
        nothing.
    """

    num_nodes: int
    init: Callable[..., State]
    propose: Callable[..., tuple[Draft, State]]
    commit: Callable[..., State]
    num_calls: int = 0
    sees: Callable[[Array], Any] = lambda features: None
    meanwhile: Callable[..., State] = lambda params, state: state


class Rule(NamedTuple):
    """An acceptance rule, two pure functions of one row.

    law: (draft, log_p `[W, V]`) -> `[W, V]` distribution of the token emitted after each window row.
    noise: (row's key, start, role, node, depth) -> key of one draw, in the round that begins at length `start`: for the
        drafter or the target (`role`), at a window row (`node`), for the token `depth` places after the last one.
    """

    law: Callable[[Draft, Array], Array]
    noise: Callable[..., Array]


class Target(NamedTuple):
    """The model whose distribution is kept.

    init: (params, prompt: Prompt, slots: int) -> (state, features `[B, P, H]`).
    score: (params, state, window `[B, W]`, parents `[B, N]` | None, sampling) -> (Scores, state).
    commit: (state, verdict, parents `[B, N]` | None) -> state, rewound to what was emitted.
    """

    init: Callable[..., tuple[State, Array]]
    score: Callable[..., tuple[Scores, State]]
    commit: Callable[..., State]


class SpecParams(NamedTuple):
    """Parameters of a speculator: its target's and its drafter's."""

    target: Params
    drafter: Params


class SpecState(NamedTuple):
    """All that the next round needs; every leaf has rows as its first axis.

    tokens: `[B, L]` prompt and output so far.
    length: `[B]` tokens in it.
    stop_length: `[B]` length at which the budget is spent.
    done: `[B]` whether the row has ended.
    stopped: `[B]` whether it ended at a stop token, not at its budget.
    key: `[B]` the row's random stream; positions are folded into it, it never changes.
    draft_limit: `[B]` most tokens to draft a round.
    sampling: rows' sampling, or None for greedy.
    target, drafter: their own states.
    """

    tokens: Array
    length: Array
    stop_length: Array
    done: Array
    stopped: Array
    key: Array
    draft_limit: Array
    sampling: Sampling | None
    target: State
    drafter: State


class SpecInfo(NamedTuple):
    """What happened in a round; returned, never fed back.

    draft, scores, verdict: the parts, the verdict cut at stops and budgets.
    start: `[B]` length before the round.
    num_drafted: `[B]` places that were drafted for, a chain's tokens or a tree's levels; 0 for a finished row.
    num_accepted: `[B]` accepted tokens, whether or not a stop cut them off.
    drafter: the drafter's state as the verdict found it.
    """

    draft: Draft
    scores: Scores
    verdict: Verdict
    start: Array
    num_drafted: Array
    num_accepted: Array
    drafter: State


class Judgement(NamedTuple):
    """What the target's half of a round finds; its `num_accepted` is that of `SpecInfo`."""

    scores: Scores
    verdict: Verdict
    num_accepted: Array


class Speculator(NamedTuple):
    """A composed way of decoding.

    init: (params, prompt: Prompt, target state, sampling, slots) -> state, nothing emitted yet.
    step: (params, state) -> (state, info); the halves one after another.
    propose: (drafter's params, state) -> (draft, drafter's state), which looks at no target's state.
    meanwhile: (drafter's params, drafter's state) -> drafter's state, see `Drafter`.
    score_verify: (target's params, state, draft) -> (state, judgement); looks at no drafter's state and leaves it as it is.
    commit: (drafter's params, drafter's state, judgement) -> drafter's state.
    """

    num_nodes: int
    init: Callable[..., SpecState]
    step: Callable[[SpecParams, SpecState], tuple[SpecState, SpecInfo]]
    propose: Callable[[Params, SpecState], tuple[Draft, State]]
    meanwhile: Callable[[Params, State], State]
    score_verify: Callable[[Params, SpecState, Draft], tuple[SpecState, Judgement]]
    commit: Callable[[Params, State, Judgement], State]


class Placement(NamedTuple):
    """Where a program's arrays live.

    params: (params: SpecParams) -> the same where it is needed.
    rows: a tree of host arrays with rows first -> on devices.
    state: a traced tree with rows first that holds a SpecState as `spec` -> the same, constrained to its layout.
    """

    params: Callable[[Any], Any]
    rows: Callable[[Any], Any]
    state: Callable[[Any], Any]


ONE_DEVICE = Placement(*(lambda tree: tree,) * 3)
