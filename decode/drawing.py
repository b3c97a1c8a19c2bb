"""How plots look: one colour a method wherever it stands, names that fit, legends that stay inside."""

import io
from collections.abc import Iterable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Bench = dict[str, Any]

# Okabe and Ito's colours stay apart for the common kinds of colour blindness; a method has one colour in all plots.
COLOURS = {"autoregressive": "#777777", "base": "#E69F00", "mixed": "#56B4E9", "routed": "#0072B2"}
COLOURS |= {"chosen": "#CC79A7", "random": "#F0E442", "wrong": "#D55E00", "oracle": "#009E73"}
# Paul Tol's muted colours serve clusters, labels and methods that have none above.
MUTED = ("#332288", "#CC6677", "#117733", "#AA4499", "#DDCC77", "#88CCEE", "#882255", "#44AA99", "#999933")
MARKERS = "osD^vP*X<>p"  # eleven beside nine colours: a pair of both comes back only after 99
INK = "#333333"
EDGE = {"markersize": 5, "markeredgecolor": INK, "markeredgewidth": 0.4}
STYLE = {"text.parse_math": False, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}
STYLE |= {"grid.color": "#E4E4E4", "legend.frameon": False, "savefig.dpi": 150}


def legend(place: Figure | Axes, handles: Iterable[Any], names: list[str], **where: Any) -> None:
    """A legend in as many columns as there is room for."""
    for columns in range(min(8, len(names)), 0, -1):
        own = place.legend(list(handles), [short(name) for name in names], ncols=columns, **where)
        if columns == 1 or own.get_window_extent().width <= place.get_window_extent().width:
            return
        own.remove()


def short(name: str) -> str:
    """A name of at most 22 letters."""
    return name if len(name) <= 22 else name[:21] + "…"


def png(figure: Figure) -> bytes:
    """The figure as a file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def cell(row: Bench, method: str, field: str) -> Any:
    """A number or list as the bench has it; None where it is missing, null or holds nothing finite."""
    value = (row.get(method) or {}).get(field)
    return value if np.isfinite(np.array(value, float)).any() else None
