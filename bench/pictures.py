"""The pictures of README's speeds: against the batch size, as a share of the peak, and the memory
of a training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from fusedmoe.speed.results import ratios, share_of_peak
from fusedmoe.speed.subjects import MAIN

DPI = 110
STYLES = {"eager": ("x eager", "-"), "best": ("x best of all", "--")}


def plain(results: Mapping, mode: str) -> dict[str, list[Mapping]]:
    """Return the float32 cases of a mode on one thread by layer, in order of the batch size; only
    layers with several of them."""
    found: dict[str, list[Mapping]] = {}
    for record in sorted(results["cases"], key=lambda record: record["batch"]):
        if (record["mode"], record["dtype"], record["threads"]) == (mode, "float32", 1) and "fused" in record["arms"]:
            found.setdefault(record["layer"], []).append(record)
    return {layer: cases for layer, cases in found.items() if len(cases) > 1 and layer in MAIN}


def per_mode(results: Mapping, title: str, path: Path, fill: Callable[[Axes, dict[str, list[Mapping]]], None]) -> bool:
    """Draw one panel a mode; return whether there was anything to draw."""
    modes = [mode for mode in ("inference", "training step") if plain(results, mode)]
    if not modes:
        return False
    figure, panels = plt.subplots(1, len(modes), figsize=(5 * len(modes), 3.6), squeeze=False, layout="constrained")
    for panel, mode in zip(panels[0], modes, strict=True):
        fill(panel, plain(results, mode))
        panel.set(title=f"{mode}, float32, one thread", xlabel="rows", xscale="log")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel(title)
    panels[0][0].legend(fontsize=7)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    plt.close(figure)
    return True


def speeds(panel: Axes, cases: Mapping[str, Sequence[Mapping]]) -> None:
    """Draw how many times as fast the fused layer is, against the batch size."""
    for number, (layer, records) in enumerate(cases.items()):
        for name, (label, line) in STYLES.items():
            points = [(record["batch"], ratios(record)[name].times) for record in records if name in ratios(record)]
            panel.plot(
                *zip(*points, strict=True),
                line,
                marker="o",
                markersize=3,
                color=f"C{number}",
                label=f"{layer}, {label}",
            )
    panel.axhline(1, color="black", linewidth=0.8)
    panel.set_ylim(bottom=0)


def shares(peak: float) -> Callable[[Axes, Mapping[str, Sequence[Mapping]]], None]:
    """Return what draws the share of the multiply-add peak against the batch size."""

    def fill(panel: Axes, cases: Mapping[str, Sequence[Mapping]]) -> None:
        for layer, records in cases.items():
            panel.plot(
                [r["batch"] for r in records],
                [100 * share_of_peak(r, peak) for r in records],
                marker="o",
                markersize=3,
                label=layer,
            )
        panel.set_ylim(0, 100)

    return fill


def memory(results: Mapping, path: Path) -> bool:
    """Draw the bytes saved for backward at the largest batch of each float32 layer, fused beside
    eager; return whether there were any."""
    largest: dict[str, Mapping] = {}
    for record in sorted(results["cases"], key=lambda record: record["batch"]):
        if "fused" in record.get("memory", {}) and record["dtype"] == "float32":
            largest[record["layer"]] = record
    if not largest:
        return False
    figure, panel = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for offset, side in ((-0.2, "eager"), (0.2, "fused")):
        values = [record["memory"][side]["saved_bytes"] / record["batch"] / 1e3 for record in largest.values()]
        panel.bar([i + offset for i in range(len(largest))], values, width=0.4, label=side)
    panel.set_xticks(range(len(largest)), [layer.replace(" ", "\n") for layer in largest], fontsize=7)
    panel.set_ylabel("saved for backward, kB a row")
    panel.legend()
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    plt.close(figure)
    return True


def draw(results: Mapping, folder: Path) -> list[str]:
    """Draw what the results have into a folder; return the names of the pictures drawn."""
    peak = results["machine"]["peak_gflops"]
    done = {
        "speed": per_mode(results, "times as fast", folder / "speed.png", speeds),
        "peak": per_mode(results, "percent of the multiply-add peak", folder / "peak.png", shares(peak)),
        "memory": memory(results, folder / "memory.png"),
    }
    return [name for name, drawn in done.items() if drawn]
