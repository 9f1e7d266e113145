"""The report's figures: as SVG that follows the page, its font and light or dark by itself, and as PNG for slides.

Each function takes plain values and returns a Drawing. `synthetic` puts a watermark over it. Text is 10.5 points in a
figure of at most 360: on a page that shows it at least 350 pixels wide, no text is smaller than 10 pixels.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("svg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.backends.backend_svg import FigureCanvasSVG  # noqa: E402
from matplotlib.colors import LinearSegmentedColormap  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

from evaluation.metrics import Interval  # noqa: E402
from reporting.text import one_line  # noqa: E402

INK = "#010203"  # stands for the page's text colour
GREY = "#888888"
# Distinct in grey, to people who see no red or green, and on white and black (after Okabe and Ito 2008).
COLOURS = ("#0a7abf", "#d55e00", "#009e73", "#b07aa1", "#9a7d0a", "#56a0d3", GREY, "#c44e52")
WIDTH, TEXT, DPI = 5.0, 10.5, 200  # inches; points; of the PNG
_STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "medslip", "font.size": TEXT, "axes.spines.top": False,
    "axes.spines.right": False, "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
    "legend.frameon": False, "legend.labelcolor": INK, "axes.titlesize": TEXT, "text.parse_math": False,
    "legend.fontsize": TEXT, "figure.constrained_layout.use": True,
}  # fmt: skip


@dataclass(frozen=True)
class Drawing:
    """One figure: the text of an <svg> for a page, and a PNG on white."""

    svg: str
    png: bytes


def _drawn(figure: Figure, title: str, synthetic: bool) -> Drawing:
    """The figure, its SVG with a name for those who cannot see it."""
    if synthetic:
        size = 34 * min(1.0, figure.get_figheight() / 1.6)  # within a figure of one row
        figure.text(0.5, 0.5, "SYNTHETIC", fontsize=size, color=GREY, alpha=0.25, ha="center", va="center",
                    rotation=20, fontweight="bold")  # fmt: skip
    text, png = io.StringIO(), io.BytesIO()
    # Laid out once and drawn twice: savefig would do each twice.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None, "Creator": None})
    figure.set(dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure).print_png(png, metadata={"Software": None})
    plt.close(figure)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = _in_tags(svg, lambda tag: tag.replace(INK, "currentColor"))
    svg = _in_tags(svg, lambda tag: re.sub(r"font:\s*([^;\"]*?)\s*'[^\"]*?sans-serif", r"font: \1 sans-serif", tag))
    escaped = one_line(title).replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return Drawing(svg.replace("<svg ", f'<svg role="img" aria-label="{escaped}" ', 1), png.getvalue())


def _in_tags(svg: str, change: Callable[[str], str]) -> str:
    """A change of the tags alone: names, between them and in the first one's label, may look like attributes."""
    return re.sub("<(?!svg )[^>]*>", lambda found: change(found[0]), svg)


def with_ids(svg: str, name: str) -> str:
    """The same figure with `name` before each of its ids, which then are unique on a page where the name is."""
    svg = _in_tags(svg, lambda tag: re.sub(r'\bid="', f'id="{name}-', tag))
    return _in_tags(svg, lambda tag: tag.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-'))


def forest(
    rows: Sequence[tuple[str, Interval]], title: str, axis: str, synthetic: bool, zero: float | None = None
) -> Drawing:
    """Names with a point and, where it is known, an interval each, percent.

    The axis does not make differences look larger than they are: that of AUROC goes from chance, 50, or the lowest
    value below it, to 100; with `zero`, which draws the line of no difference there, it has it in its middle and at
    least 10 points to each side.
    """
    with plt.rc_context(_STYLE):
        figure, ax = plt.subplots(figsize=(WIDTH, 0.7 + 0.46 * len(rows)))
        places = np.arange(len(rows))[::-1]
        for place, (name, value) in zip(places, rows, strict=True):
            # Above its line, in the full width: beside it, long names would leave no room for lines on a phone.
            ax.text(0.01, place + 0.17, _shortened(name), transform=ax.get_yaxis_transform(), va="bottom")
            if value.value is None:
                continue
            grey = value.low is None or value.high is None or (zero is not None and value.low <= zero <= value.high)
            colour = GREY if grey else COLOURS[0]
            if value.low is not None and value.high is not None:
                ax.plot([100 * value.low, 100 * value.high], [place, place], color=colour, lw=2, solid_capstyle="butt")
            ax.plot(100 * value.value, place, "o", color=colour, ms=6)
        ends = [100 * end for _, value in rows for end in (value.low, value.value, value.high) if end is not None]
        if zero is not None:
            reach = max([10.0, *(1.05 * abs(end - 100 * zero) for end in ends)])
            ax.set_xlim(100 * zero - reach, 100 * zero + reach)
        else:
            ax.set_xlim(min([50.0, *(10 * np.floor(end / 10) for end in ends)]) - 0.5, 100.5)
        chance = 50 if zero is None else 100 * zero
        ax.vlines([chance] * len(rows), places - 0.28, places + 0.14, color=INK, lw=0.8, ls=":")  # not through names
        ax.spines["left"].set_visible(False)
        ax.set_yticks([])
        ax.set_ylim(-0.5, len(rows) - 0.4)
        ax.set_xlabel(axis)
        return _drawn(figure, title, synthetic)


def _shortened(name: str, most: int = 46) -> str:
    name = one_line(name)
    return name if len(name) <= most else name[: most - 1] + "…"


def curves(
    rows: Sequence[tuple[str, np.ndarray, np.ndarray, np.ndarray, np.ndarray]],
    title: str,
    axes: tuple[str, str],
    synthetic: bool,
    diagonal: bool = False,
    unit: bool = True,
    level: tuple[str, float] | None = None,
    least: float = 0.0,
    epochs: bool = False,
) -> Drawing:
    """Lines with bands: name, x (n,), y, low and high; an empty low draws none.

    Args:
        unit: both axes from 0 to 1; else the vertical one begins at `least`, or at what lies lower.
        level: a dotted horizontal line and what it is called: what chance would give.
        epochs: the horizontal axis counts: whole numbers alone.
    """
    with plt.rc_context(_STYLE):
        figure, ax = plt.subplots(figsize=(WIDTH, 4.0 + 0.22 * (len(rows) + (level is not None))))
        lines, names = [], []
        for colour, style, (name, x, y, low, high) in zip(
            COLOURS * 9, [s for s in ("-", "--", "-.", ":") for _ in COLOURS] * 9, rows, strict=False
        ):
            marker = "o" if len(x) < 30 else None
            lines += ax.plot(x, y, color=colour, ls=style, lw=1.6, marker=marker, ms=3.5)
            names.append(_shortened(name))
            if len(low):
                ax.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
        if diagonal:
            ax.plot([0, 1], [0, 1], color=INK, lw=0.8, ls=":")
        if level is not None:
            lines.append(ax.axhline(level[1], color=INK, lw=0.8, ls=":"))
            names.append(level[0])
        if unit:
            ax.set_xlim(0, 1)
            ax.set_ylim(0, 1.01)
        else:
            lowest = min(
                [least, *(float(np.nanmin(own)) for row in rows for own in row[2:4] if np.isfinite(own).any())]
            )
            ax.set_ylim(bottom=lowest)
        if epochs:
            ax.set_xlim(0, 1.03 * max(x.max() for _, x, *_ in rows))  # of a single epoch there is no whole number else
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_xlabel(axes[0])
        ax.set_ylabel(axes[1])
        figure.legend(lines, names, loc="outside lower left", ncols=1)
        return _drawn(figure, title, synthetic)


MOST_NUMBERS = 8  # classes of a confusion matrix whose cells have room for their numbers


def confusion(counts: np.ndarray, classes: Sequence[str], title: str, synthetic: bool) -> Drawing:
    """A confusion matrix (k, k), a row for each true class, shaded by the fraction of its row."""
    with plt.rc_context(_STYLE):
        figure, ax = plt.subplots(figsize=(WIDTH, 4.4 if len(classes) <= MOST_NUMBERS else 5.4))
        fraction = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        shades = LinearSegmentedColormap.from_list("", [(0.04, 0.48, 0.75, 0.04), (0.04, 0.48, 0.75, 0.75)])
        edges = np.arange(len(classes) + 1) - 0.5
        ax.pcolormesh(edges, edges, fraction, cmap=shades, vmin=0, vmax=1)  # vectors, where imshow embeds a bitmap
        ax.invert_yaxis()
        for i in range(len(classes) if len(classes) <= MOST_NUMBERS else 0):
            for j in range(len(classes)):
                number = f"{counts[i, j]:.1f}".removesuffix(".0")
                ax.text(j, i, f"{number}\n{100 * fraction[i, j]:.0f}%", ha="center", va="center")
        labels = [_broken(name) for name in classes]
        ax.set_xticks(range(len(classes)), labels, rotation=0 if len(classes) <= 4 else 90)
        ax.set_yticks(range(len(classes)), labels)
        ax.set_xlabel("predicted")
        ax.set_ylabel("true")
        ax.spines[:].set_visible(False)
        return _drawn(figure, title, synthetic)


def _broken(name: str, most: int = 10) -> str:
    """A class's name in lines that are short enough for a column of a matrix."""
    return "\n".join(textwrap.wrap(_shortened(name, 30).replace("_", " "), most)) or name


def flow(steps: Sequence[tuple[str, str]], title: str, synthetic: bool) -> Drawing:
    """A flow diagram from top to bottom: (box, what left before it, or nothing)."""
    with plt.rc_context(_STYLE):
        figure, ax = plt.subplots(figsize=(WIDTH, 1.0 * len(steps) - 0.3))
        for i, (box, left) in enumerate(steps):
            y = -i
            ax.text(0, y, box, ha="left", va="center", bbox={"boxstyle": "round,pad=0.4", "fc": "none", "ec": INK})
            if i:
                ax.annotate("", (0.1, y + 0.2), (0.1, y + 0.8), arrowprops={"arrowstyle": "->", "color": INK})
            if left:
                ax.text(0.16, y + 0.5, "\n".join(textwrap.wrap(left, 46)), ha="left", va="center")
        ax.set_xlim(-0.04, 1)
        ax.set_ylim(-len(steps) + 0.6, 0.4)
        ax.axis("off")
        return _drawn(figure, title, synthetic)


# ---------------------------------------------------------------------------------------------------------------------
# What the lines are made of
# ---------------------------------------------------------------------------------------------------------------------

GRID = np.linspace(0, 1, 101)


def roc_on_grid(positive: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Sensitivity at each false positive rate of GRID for each row of weights (R, n): (R, 101)."""
    hits, alarms = _steps(positive, score, weights)
    return np.stack([np.interp(GRID, a, h) for a, h in zip(alarms / alarms[:, -1:], hits / hits[:, -1:], strict=True)])


def precision_on_grid(positive: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Precision at each recall of GRID for each row of weights (R, n): (R, 101)."""
    hits, alarms = _steps(positive, score, weights)
    precision = hits / np.maximum(hits + alarms, 1e-12)
    precision[:, 0] = precision[:, 1]
    return np.stack([np.interp(GRID, h, p) for h, p in zip(hits / hits[:, -1:], precision, strict=True)])


def _steps(positive: np.ndarray, score: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hits and false alarms (R, distinct scores + 1) from the strictest threshold on."""
    order = np.argsort(-score, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(score[order]) < 0])
    weights = weights[:, order].astype(np.float64)
    zero = np.zeros((len(weights), 1))
    hits = np.cumsum(np.add.reduceat(weights * positive[order], starts, axis=1), axis=1)
    alarms = np.cumsum(np.add.reduceat(weights * ~positive[order], starts, axis=1), axis=1)
    return np.hstack([zero, hits]), np.hstack([zero, alarms])


def reliability(positive: np.ndarray, probability: np.ndarray, bins: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Mean probability and observed fraction (bins,) of equally many samples each."""
    parts = [part for part in np.array_split(np.argsort(probability, kind="stable"), bins) if len(part)]
    return np.array([probability[p].mean() for p in parts]), np.array([positive[p].mean() for p in parts])
