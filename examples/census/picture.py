"""Draw the one picture: the speed, two loss curves lying on each other, and the mixing weights of
each level.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from fusedmoe.demo.model import expert_names, unit_names
from fusedmoe.demo.outcome import Outcome
from fusedmoe.demo.training import Arm

NIGHT, PANEL, GRID = "#0e1320", "#151c2d", "#26304a"
INK, QUIET = "#e9edf7", "#8b97b4"
PLAIN, FUSED = "#6f7fa6", "#ffb65c"
GLOW = LinearSegmentedColormap.from_list("glow", [PANEL, "#3a2d63", "#8c3b7e", "#e0605e", "#ffb65c", "#fff3d0"])
# Steps over which the loss curves are averaged: a quarter of an epoch of Census-Income hides the
# batches' noise, not the descent.
SMOOTH = 17


def smooth(values: list[float], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (steps, means over `width` neighbouring values)."""
    width = max(1, min(width, len(values)))
    means = np.convolve(values, np.ones(width) / width, mode="valid")
    return np.arange(len(means)) + (width + 1) / 2, means


def draw(outcome: Outcome, path: Path) -> None:
    """Draw the outcome and save it at `path`, making its folder if need be."""
    levels = len(outcome.mixing)
    figure = Figure(figsize=(15.2, 5.4), facecolor=NIGHT)
    FigureCanvasAgg(figure)
    outer = figure.add_gridspec(
        1, 3, width_ratios=[0.8, 1.08, 1.3], left=0.035, right=0.985, top=0.76, bottom=0.13, wspace=0.2
    )
    draw_speed(figure.add_subplot(outer[0]), outcome.plain, outcome.fused)
    draw_losses(figure.add_subplot(outer[1]), outcome.plain, outcome.fused)
    inner = outer[2].subgridspec(levels, 1, hspace=0.42)
    # The upper level stands above, as in the network.
    for level in range(levels):
        draw_mixing(figure.add_subplot(inner[levels - 1 - level]), outcome, level)
    titles = ("speed", "the same training", "who listens to whom")
    notes = ("median ms, the arms in turn", "loss by step, two curves", "mean mixing weights on the test rows")
    for column, title, note in zip(outer, titles, notes, strict=False):
        left = column.get_position(figure).x0
        figure.text(left, 0.835, title, color=INK, fontsize=14, weight="bold")
        figure.text(left, 0.79, note, color=QUIET, fontsize=9.5)
    figure.text(0.035, 0.925, headline(outcome), color=INK, fontsize=19, weight="bold")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=180, facecolor=NIGHT)


def headline(outcome: Outcome) -> str:
    """Say what was trained on what, and how many times faster."""
    ratio = outcome.plain.step_ms / outcome.fused.step_ms
    return f"{outcome.family.replace('_', '-')} on {outcome.data.name}: one call to fuse, {ratio:.1f}× faster training"


def style(axes: Axes) -> None:
    """Give a panel the picture's colours, without a frame."""
    axes.set_facecolor(PANEL)
    axes.tick_params(colors=QUIET, labelsize=9, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def draw_speed(axes: Axes, plain: Arm, fused: Arm) -> None:
    """Draw a pair of bars for a training step and one for a batch of inference, each scaled to its
    own slower arm.
    """
    style(axes)
    pairs = [("training step", plain.step_ms, fused.step_ms), ("inference", plain.inference_ms, fused.inference_ms)]
    for row, (what, slow, fast) in enumerate(pairs):
        y = 1.35 * (len(pairs) - 1 - row)
        longest = max(slow, fast)
        for offset, value, colour in ((0.2, slow, PLAIN), (-0.2, fast, FUSED)):
            axes.barh(y + offset, value / longest, height=0.34, color=colour)
            axes.text(value / longest + 0.02, y + offset, f"{value:.1f} ms", color=INK, fontsize=10, va="center")
        axes.text(0, y + 0.47, what, color=QUIET, fontsize=10.5, va="bottom")
        axes.text(
            1.3, y + 0.44, f"{slow / fast:.1f}×", color=FUSED, fontsize=22, weight="bold", va="bottom", ha="right"
        )
    axes.set_xlim(-0.04, 1.34)
    axes.set_ylim(-0.55, 2.15)
    axes.set_xticks([])
    axes.set_yticks([])
    for x, name, colour in ((0.0, plain.name, PLAIN), (0.62, fused.name, FUSED)):
        axes.text(x, -0.09, f"■ {name}", color=colour, fontsize=10, transform=axes.transAxes)


def draw_losses(axes: Axes, plain: Arm, fused: Arm) -> None:
    """Draw the plain curve broad and the fused one as a thin line inside it.

    Dots are the validation part.
    """
    style(axes)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    steps, means = smooth(plain.losses, SMOOTH)
    axes.plot(steps, means, color=PLAIN, linewidth=6.5, alpha=0.75, solid_capstyle="round", label=plain.name)
    axes.plot(*smooth(fused.losses, SMOOTH), color=FUSED, linewidth=1.4, label=fused.name)
    axes.scatter(*zip(*plain.validation, strict=True), s=90, color=PLAIN, zorder=3)
    axes.scatter(*zip(*fused.validation, strict=True), s=22, color=FUSED, zorder=4, label="validation")
    # The first steps fall from far above and would squeeze all the rest into a line.
    shown = np.concatenate([means[len(means) // 20 :], [loss for _, loss in plain.validation]])
    margin = 0.06 * np.ptp(shown)
    axes.set_ylim(shown.min() - margin, shown.max() + margin)
    axes.set_xlim(0, len(plain.losses) * 1.03)
    axes.set_xlabel("step", color=QUIET, fontsize=9.5)
    axes.legend(frameon=False, labelcolor=INK, fontsize=10, loc="upper right")


def draw_mixing(axes: Axes, outcome: Outcome, level: int) -> None:
    """Draw one level's mixing weights: a row for each unit, a column for each expert, the number in
    the cell.
    """
    style(axes)
    weights = outcome.mixing[level].numpy()  # [U, E]
    # Static weights may be negative: the colour says how much is taken, the number with which sign.
    size = np.abs(weights)
    axes.imshow(size, cmap=GLOW, aspect="auto", vmin=0, vmax=max(1e-9, size.max()))
    for (u, e), value in np.ndenumerate(weights):
        if e in outcome.table.levels[level].units[u].reads:
            axes.text(
                e,
                u,
                f"{value:.2f}",
                ha="center",
                va="center",
                fontsize=9,
                color=NIGHT if size[u, e] > 0.6 * size.max() else INK,
            )
    units, experts = weights.shape
    axes.set_yticks(range(units), unit_names(outcome.data.tasks, units))
    axes.set_xticks(range(experts), expert_names(outcome.family, outcome.data.tasks, experts))
    axes.set_xticks(np.arange(0.5, experts - 1), minor=True)
    axes.set_yticks(np.arange(0.5, units - 1), minor=True)
    axes.grid(which="minor", color=NIGHT, linewidth=2)
    axes.tick_params(which="minor", length=0)
    axes.set_title(f"level {level + 1}", color=QUIET, fontsize=9.5, loc="right", pad=4)
