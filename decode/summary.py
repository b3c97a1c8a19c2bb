"""The methods of a bench in one table: what their drafts gain, and what they cost to draft, to verify and to train."""

from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = {
    "draft_accuracy": ("draft accuracy", ".3f"),
    "mean_acceptance_length": ("tokens a target call", ".2f"),
    "nodes_a_round": ("nodes verified", ".3g"),
    "drafter_calls_a_round": ("drafter calls", ".3g"),
    "tokens_per_second": ("tokens/s", ".0f"),
}


def summary(bench: Mapping[str, Any]) -> list[str]:
    """Lines of Markdown, a row a method."""
    heads = ["method", *(head for head, _ in COLUMNS.values()), "lossless", "trained parameters", "training, s"]
    rows = [_cells(bench, name, row) for name, row in bench["mean"].items()]
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---", *["---:"] * (len(heads) - 1)], *rows)]


def _cells(bench: Mapping[str, Any], name: str, row: Mapping[str, Any]) -> list[str]:
    figures = [_said(row[key], form) for key, (_, form) in COLUMNS.items()]
    trained = bench["trained"].get(name)
    cost = ("-", "-") if trained is None else (f"{trained['parameters']:,}", f"{trained['seconds']:.0f}")
    return [name, *figures, _lossless([own[name] for own in bench["tasks"].values()]), *cost]


def _lossless(rows: Sequence[Mapping[str, Any]]) -> str:
    """What was seen of texts that noise does not change; p/q rejection promises a distribution, which no text shows."""
    equal = [row["equal_to_autoregressive"] for row in rows]
    if any(own is None for own in equal):
        return "yes, by law"
    parted = 1 - sum(equal) / len(equal)
    return "yes" if parted == 0 else f"yes; {100 * parted:.1f} % part where logits tie"


def _said(value: float | None, form: str) -> str:
    return format(value, form) if value is not None else "-"
