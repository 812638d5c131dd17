"""The style of every picture: colours, markers, axes, and how a figure becomes a file or part of a page."""

from __future__ import annotations

import io
import re
import warnings
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastres.utils.atomic_io import atomic_write
from fastres.utils.suggest import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

# The palette of Okabe and Ito (2008), which people with any colour vision can tell apart. Its black is left to text,
# and its yellow is too light for lines on white.
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
COLORS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
MARKERS = "osD^vPX"
DASHES = ("-", "--", ":", "-.")
# Text, ticks and frames. A page replaces it by its own text's colour, so no data may be drawn in it.
INK = "#21252b"
DPI = 130
LABEL_LENGTH = 60  # characters of a name in a legend or a title


def line_style(i: int) -> dict[str, Any]:
    """Return the colour, marker and dashes of line `i`.

    The first 42 lines differ in colour or marker, so a print without colours is readable too. After each six lines the
    dashes change.
    """
    return {
        "color": COLORS[i % len(COLORS)],
        "marker": MARKERS[i % len(MARKERS)],
        "linestyle": DASHES[i // len(COLORS) % len(DASHES)],
    }


def shorten(name: str, most: int = LABEL_LENGTH) -> str:
    """Return a name in one line, without its middle if it is long, because names often differ at their ends."""
    name = one_line(name)
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-(most - most // 2) :]}"


def new_figure(width: float, height: float, *, layout: Any = None) -> Figure:
    """Return a figure of this size in inches that neither opens a window nor changes matplotlib's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot, which does both

    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def tidy(axes: Axes, grid: str = "both") -> None:
    """Give the axes the common frame, colours and grid, whose lines are those of `grid` (both, x or y)."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(which="both", color=INK, labelcolor=INK, labelsize=9)
    for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
        text.set_color(INK)
    axes.grid(axis=grid, color=INK, alpha=0.15, linewidth=0.6)  # type: ignore[arg-type]
    axes.set_axisbelow(True)


def set_labels(legend: Legend, labels: list[str]) -> None:
    """Show the labels as they are: matplotlib hides one with a leading underscore and sets formulas between dollars."""
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set(text=label, parse_math=False, color=INK)


def save(figure: Figure, path: Path, dpi: int = DPI) -> None:
    """Write the figure atomically in the format of the file's suffix, PNG if it has none. Equal data, equal bytes.

    Raises:
        OSError: if the file cannot be written.
        ValueError: if matplotlib does not know the format.
    """
    kind = path.suffix.removeprefix(".").lower() or "png"
    how: dict[str, Any] = {"metadata": {"Software": None}} if kind == "png" else {}  # matplotlib's version
    with atomic_write(path) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the font lacks the characters of some languages and draws boxes
        figure.savefig(file, dpi=dpi, format=kind, **how)


def inline_svg(figure: Figure, name: str, description: str) -> str:
    """Return the figure as an <svg> element for a page.

    Its text has the colour and the font of the page around it. Its identifiers begin with `name`, which has to be
    unique in the page, and it refers to nothing outside of it.

    Args:
        figure: the figure.
        name: letters, digits and hyphens.
        description: the alternative text; it is escaped here.
    """
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure.savefig(file, format="svg", dpi=2 * DPI, transparent=True)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    view = re.search(r'viewBox="[-0-9. ]+"', svg)
    assert view is not None
    svg = svg[svg.index(">") + 1 :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<[^>]+>", lambda tag: _adapted(tag[0], name), svg)
    svg = re.sub(r"\n\s*", "\n", svg)
    label = escape(description)
    return f'<svg {view[0]} role="img" aria-label="{label}" xmlns:xlink="http://www.w3.org/1999/xlink">{svg}'


def _adapted(tag: str, name: str) -> str:
    """Return a tag of matplotlib's SVG with unique identifiers, and with the page's font and colour."""
    tag = re.sub(r'( id="|"#|url\(#)', rf"\g<1>{name}-", tag)
    return re.sub(r"(px|font-family:) '[^;\"]*", r"\1 system-ui, sans-serif", tag).replace(INK, "currentColor")
