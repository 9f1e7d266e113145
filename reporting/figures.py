"""The report's figures, as SVG that follows the page: its font, and light or dark by itself.

Each function takes plain values and returns the text of one <svg>. `synthetic` puts a watermark over it.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("svg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.colors import LinearSegmentedColormap  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from evaluation.metrics import Interval  # noqa: E402
from reporting.text import one_line  # noqa: E402

INK = "#010203"  # stands for the page's text colour
# Distinct in grey, to people who see no red or green, and on white and black (after Okabe and Ito 2008).
COLOURS = ("#0a7abf", "#d55e00", "#009e73", "#b07aa1", "#9a7d0a", "#56a0d3", "#888888", "#c44e52")
_STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "medslip", "font.size": 10, "axes.spines.top": False,
    "axes.spines.right": False, "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
    "legend.frameon": False, "legend.labelcolor": INK, "axes.titlesize": 10, "text.parse_math": False,
}  # fmt: skip


def _svg(figure: Figure, title: str, synthetic: bool) -> str:
    """The figure as inline SVG with a name for those who cannot see it."""
    if synthetic:
        figure.text(0.5, 0.5, "SYNTHETIC", fontsize=34, color="#888888", alpha=0.25, ha="center", va="center",
                    rotation=20, fontweight="bold")  # fmt: skip
    text = io.StringIO()
    figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = _in_tags(svg, lambda tag: tag.replace(INK, "currentColor"))
    svg = _in_tags(svg, lambda tag: re.sub(r"font:\s*([^;\"]*?)\s*'[^\"]*?sans-serif", r"font: \1 sans-serif", tag))
    escaped = one_line(title).replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escaped}" ', 1)


def _in_tags(svg: str, change: Callable[[str], str]) -> str:
    """A change of the tags alone: names, between them and in the first one's label, may look like attributes."""
    return re.sub("<(?!svg )[^>]*>", lambda found: change(found[0]), svg)


def with_ids(svg: str, name: str) -> str:
    """The same figure with `name` before each of its ids, which then are unique on a page where the name is."""
    svg = _in_tags(svg, lambda tag: re.sub(r'\bid="', f'id="{name}-', tag))
    return _in_tags(svg, lambda tag: tag.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-'))


def forest(
    rows: Sequence[tuple[str, Interval]], title: str, axis: str, synthetic: bool, zero: float | None = None
) -> str:
    """Names with a point and, where it is known, an interval each, percent; `zero` draws the line of no difference."""
    with plt.rc_context(_STYLE):
        figure, ax = plt.subplots(figsize=(6.4, 0.9 + 0.32 * len(rows)))
        places = np.arange(len(rows))[::-1]
        for place, (_, value) in zip(places, rows, strict=True):
            if value.value is None:
                continue
            grey = value.low is None or value.high is None or (zero is not None and value.low <= zero <= value.high)
            colour = "#888888" if grey else COLOURS[0]
            if value.low is not None and value.high is not None:
                ax.plot([100 * value.low, 100 * value.high], [place, place], color=colour, lw=2, solid_capstyle="butt")
            ax.plot(100 * value.value, place, "o", color=colour, ms=6)
        if zero is not None:
            ax.axvline(100 * zero, color=INK, lw=0.8, ls=":")
        ax.set_yticks(places, [_shortened(name) for name, _ in rows])
        ax.set_ylim(-0.6, len(rows) - 0.4)
        ax.set_xlabel(axis)
        ax.tick_params(axis="y", length=0)
        return _svg(figure, title, synthetic)


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
) -> str:
    """Lines with bands: name, x (n,), y, low and high; an empty low draws none."""
    with plt.rc_context(_STYLE):
        figure, ax = plt.subplots(figsize=(5.2, 4.2))
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
        if unit:
            ax.set_xlim(0, 1)
            ax.set_ylim(0, 1.01)
        ax.set_xlabel(axes[0])
        ax.set_ylabel(axes[1])
        ax.legend(lines, names, fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.14), ncols=1)
        return _svg(figure, title, synthetic)


def confusion(counts: np.ndarray, classes: Sequence[str], title: str, synthetic: bool) -> str:
    """A confusion matrix (k, k), a row for each true class, shaded by the fraction of its row."""
    with plt.rc_context(_STYLE):
        figure, ax = plt.subplots(figsize=(3.9, 3.2))
        fraction = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        shades = LinearSegmentedColormap.from_list("", [(0.04, 0.48, 0.75, 0.04), (0.04, 0.48, 0.75, 0.75)])
        edges = np.arange(len(classes) + 1) - 0.5
        ax.pcolormesh(edges, edges, fraction, cmap=shades, vmin=0, vmax=1)  # vectors, where imshow embeds a bitmap
        ax.invert_yaxis()
        ax.set_aspect("equal")
        for i in range(len(classes)):
            for j in range(len(classes)):
                number = f"{counts[i, j]:.1f}".removesuffix(".0")
                ax.text(j, i, f"{number}\n{100 * fraction[i, j]:.0f}%", ha="center", va="center", fontsize=9)
        labels = [one_line(name).replace("_WITHOUT_", "\nWITHOUT\n").replace("_", " ") for name in classes]
        ax.set_xticks(range(len(classes)), labels, fontsize=7)
        ax.set_yticks(range(len(classes)), labels, fontsize=7)
        ax.set_xlabel("predicted")
        ax.set_ylabel("true")
        ax.spines[:].set_visible(False)
        return _svg(figure, title, synthetic)


def flow(steps: Sequence[tuple[str, str]], title: str, synthetic: bool) -> str:
    """A flow diagram from top to bottom: (box, what left before it, or nothing)."""
    with plt.rc_context(_STYLE):
        figure, ax = plt.subplots(figsize=(6.4, 0.85 * len(steps)))
        for i, (box, left) in enumerate(steps):
            y = -i
            ax.text(0, y, box, ha="center", va="center", bbox={"boxstyle": "round,pad=0.5", "fc": "none", "ec": INK})
            if i:
                ax.annotate("", (0, y + 0.3), (0, y + 0.72), arrowprops={"arrowstyle": "->", "color": INK})
            if left:
                ax.text(0.55, y + 0.5, left, ha="left", va="center", fontsize=9, color="#888888")
        ax.set_xlim(-1, 2)
        ax.set_ylim(-len(steps) + 0.4, 0.6)
        ax.axis("off")
        return _svg(figure, title, synthetic)


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
