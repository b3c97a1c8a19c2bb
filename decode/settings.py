"""What a bench measures, and how: the settings of `decode.bench`, and of the commands that measure in its way."""

from dataclasses import dataclass, field
from typing import Literal

from jaxspec.config import Mesh


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What is measured, and how."""

    pool: str
    """Folder of the pool."""
    prompts: str = ""
    """Prompts to decode; without it the pool's own test split."""
    include: tuple[str, ...] = ()
    """Files of the prompts folder, named without suffix; none means those that the pool was trained on."""
    tasks: tuple[str, ...] = ()
    """Tasks whose prompts are taken, by their labels; none means all."""
    limit: int | None = None
    """First prompts taken of each task."""
    json: str = ""
    """File for the results."""
    methods: tuple[str, ...] = ("autoregressive", "base", "mixed", "routed", "chosen", "random", "oracle")
    """`all` that the pool has, or any of autoregressive, base, mixed, routed, chosen, random, wrong, oracle, ngram, adaptive,
    tree, graph, merged-trees, merged-trees-two-best, multi-draft, card, feature, online and online-wrong: `routed` drafts with
    the drafter of the prompt's task, `chosen` with the drafter and, one prompt at a time, the draft length that promise the
    most, `ngram` with what followed in the text before, `tree` as routed, token trees of `nodes` and `depth` in place of
    chains, `graph` such trees in which nodes that end alike are drafted once, `merged-trees` those of routed and mixed under
    one root, `merged-trees-two-best` those of the router's first and second choice of task, `adaptive` those of trigram
    tables, which learn as they decode, `multi-draft` as routed with several drafts of every place, `card` as routed out of a
    cache of candidates that is filled while the target verifies; `feature`, once `train.feature` has trained it, with guesses
    of the target's hidden states; `online` begins as routed and `online-wrong` with a wrong drafter, and both change it
    within the text for the one that the target agrees with; merged-average, merged-awd, merged-doge, once `train.extras` has
    made them; and what `train.adopt` has added; NAME/METHOD is a rival's method."""
    rivals: tuple[str, ...] = ()
    """Further pools of the same target, each NAME=POOL, or NAME=POOL,DRAFT where its base drafter has another place than its
    manifest says: a row NAME measures a rival's routed drafters at its own draft length, in the type and on the mesh of
    the bench's pool, whose `base` is that of every row's speedup."""
    batch: int = 1
    """Slots: prompts decoded together; a finished one's slot is filled again."""
    admit_rows: int = 1
    """Prompts read together when slots fall free."""
    smallest_bucket: int = 32
    """Prompts are padded to at least so many tokens; a large value means fewer programs to compile."""
    passes: int = 3
    """Timed passes over all prompts."""
    max_new_tokens: int = 96
    """Longest completion, in tokens."""
    num_speculative_tokens: int | None = None
    """Tokens drafted a round; None is what calibration chose, for each pool its own."""
    nodes: int = 16
    """Tokens of a tree that are verified a round, for `tree`, `graph`, both of `merged-trees` and `adaptive`."""
    depth: int = 6
    """Levels of a tree, of which each costs `tree` a call of the drafter."""
    beam: int = 4
    """Nodes of a level of a tree that are expanded, and children that each of them is given."""
    ancestors: int = 1
    """For `graph`, ancestors whose tokens two nodes share, beside their own, of which one is drafted for both."""
    layers: int = 6
    """Layers that `card` adds to its cache while the target verifies, each a call of the drafter."""
    layer_nodes: int = 8
    """Nodes of a layer, and children that each of them is given."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""
    acceptance: Literal["rejection", "gumbel"] = "rejection"
    """Rule above temperature 0: p/q rejection, or Gumbel coupling, whose text does not depend on the drafter."""
    top_k: int | None = None
    """Sample among so many tokens."""
    top_p: float | None = None
    """Sample among the likeliest tokens of this mass."""
    drafts: int = 2
    """Drafts of every place by `multi-draft`; a round verifies so many times `num-speculative-tokens`."""
    several: Literal["greedy-drafts", "recursive", "recursive-with-replacement", "k-seq"] = "recursive"
    """How they are drawn and chosen among above temperature 0: the likeliest and one draw by the rule that is optimal for them,
    draws without or with replacement by recursive rejection, or draws with replacement by K-SEQ. The first draft, which goes
    on, is kept most often by recursive rejection."""
    seed: int = 0
    """Seed of sampling and of random routes."""
    widths: tuple[int, ...] = (1, 2, 4, 8)
    """Widths at which the autoregressive baseline is tried; the fastest is timed."""
    dtype: Literal["", "float32", "bfloat16"] = ""
    """float32 or bfloat16; empty is what the pool was made with."""
    target: str = ""
    """Another place of the pool's target."""
    widen: str = ""
    """llama-2-7b, llama-3.2-1b or llama-3.1-8b: the target is widened to that shape and cost and says what it said before;
    rounds are timed anew first, unless `num-speculative-tokens` is given."""
    lengths: tuple[int, ...] = ()
    """With `widen`, the numbers of drafted tokens whose rounds are timed; none means those of calibration."""
    draft: str = ""
    """Another place of the pool's base drafter."""
    mesh: Mesh = field(default_factory=Mesh)
    """The devices that decode; the slots divide over `data`."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """What `decode.card` counts and measures, and how."""

    pool: str
    """Folder of the pool."""
    prompts: str = ""
    """Prompts to decode, as many at a time as the meshes' `data` divides; without it the pool's own test split."""
    limit: int = 2
    """First prompts taken of each task."""
    num_speculative_tokens: int | None = None
    """Tokens of the longest chain that is verified; None is what calibration chose."""
    layers: tuple[int, ...] = (4,)
    """Layers that the drafter adds while the target verifies, each in one call."""
    layer_nodes: tuple[int, ...] = (8,)
    """Nodes of a layer, and children that each of them is given."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""
    target_milliseconds: float | None = None
    """What a target call takes; None measures it here."""
    drafter_milliseconds: float | None = None
    """What a drafter call takes, which reads a layer; None measures it here."""
    passes: int = 3
    """Timed passes, where something is measured."""
    max_new_tokens: int = 96
    """Longest completion, in tokens."""
    seed: int = 0
    """Seed of sampling."""
    dtype: Literal["", "float32", "bfloat16"] = ""
    """float32 or bfloat16; empty is what the pool was made with."""
    target: str = ""
    """Another place of the pool's target."""
    draft: str = ""
    """Another place of the pool's base drafter."""
    mesh: Mesh = field(default_factory=Mesh)
    """The devices that decode; with `apart` the target's."""
    apart: bool = False
    """The drafter works at the same time on devices of its own, and rounds are timed so as well."""
    draft_mesh: Mesh = field(default_factory=Mesh)
    """With `apart` the drafter's devices, which come behind the target's."""
    json: str = ""
    """File for the figures."""
