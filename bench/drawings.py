"""Draw docs/levels.png from the families' tables, `make drawings`: the parts of one level, and who
reads what in MMoE, PLE and AdaTT."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from fusedmoe.families import adatt_sp, mmoe, ple
from fusedmoe.parts import Level
from fusedmoe.table import Table

PATH = Path(__file__).parent.parent / "docs/levels.png"
DPI = 110
SLOTS, EXPERTS, UNITS = 0.0, 1.0, 2.0
# Two tasks in each: the first level of the network.
PANELS = {
    "MMoE: every expert reads x,\nevery unit sees every expert": mmoe(4, [[4]], 2, 3),
    "PLE: a unit sees its task's experts\nand the shared ones": ple(4, [[4], [4]], 2, 2, 1),
    "AdaTT: experts belong to tasks,\nunits see all; static weights on their own": adatt_sp(4, [[4]], 2, 2),
}


def places(count: int) -> list[float]:
    """Where `count` boxes stand in a row of width 1."""
    return [(i + 0.5) / count for i in range(count)]


def box(panel: Axes, x: float, y: float, text: str, color: str) -> None:
    panel.text(
        x,
        y,
        text,
        ha="center",
        va="center",
        fontsize=8,
        bbox={"boxstyle": "round,pad=0.35", "facecolor": color, "edgecolor": "black"},
    )


def draw(panel: Axes, table: Table, title: str, explained: bool = False) -> None:
    """Draw the first level of a table: slots below, experts, units above."""
    level: Level = table.levels[0]
    slots, experts, units = places(table.inputs[0].slots), places(len(level.experts)), places(len(level.units))
    for e, expert in enumerate(level.experts):
        panel.plot([slots[expert.sources[0].index], experts[e]], [SLOTS, EXPERTS], color="0.5", linewidth=1)
    for u, unit in enumerate(level.units):
        own = unit.static.experts if unit.static else ()
        for e in unit.reads:
            panel.plot(
                [experts[e], units[u]],
                [EXPERTS, UNITS],
                color="C3" if e in own else "C0",
                linewidth=2 if e in own else 1,
            )
        if unit.gate:
            panel.plot(
                [slots[unit.gate.selectors[0][0].index], units[u]],
                [SLOTS, UNITS],
                color="C2",
                linewidth=1,
                linestyle=":",
            )
    for s, x in enumerate(slots):
        box(panel, x, SLOTS, "x" if table.inputs[0].slots == 1 else f"slot {s}", "white")
    for e, x in enumerate(experts):
        box(panel, x, EXPERTS, f"expert {e}" if len(experts) < 4 else f"e{e}", "#fff2cc")
    for u, x in enumerate(units):
        box(panel, x, UNITS, f"unit {u}", "#dae8fc")
    if explained:
        lines = {
            "read by an expert": ("0.5", "-"),
            "read by a gate (selector)": ("C2", ":"),
            "gate's weight": ("C0", "-"),
            "gate's and static weight": ("C3", "-"),
        }
        for label, (color, style) in lines.items():
            panel.plot([], [], color=color, linestyle=style, label=label)
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.02), fontsize=7, ncol=2, frameon=False)
    panel.set(xlim=(0, 1), ylim=(-0.3, 2.3))
    panel.set_title(title, fontsize=8)
    panel.axis("off")


def main() -> None:
    figure, panels = plt.subplots(1, len(PANELS), figsize=(3.6 * len(PANELS), 3.4), layout="constrained")
    for number, (title, table) in enumerate(PANELS.items()):
        draw(panels[number], table, title, explained=number == 1)
    figure.savefig(PATH, dpi=DPI, metadata={"Software": None})
    print(PATH.relative_to(PATH.parent.parent))


if __name__ == "__main__":
    main()
