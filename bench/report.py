"""Write README's table of speeds from bench/results/cpu.json: `make report`. No figure in README is typed by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- speeds: written by `make report` -->", "<!-- end of speeds -->"


def duration(seconds: float) -> str:
    """Return seconds as text with three digits and a unit."""
    return f"{seconds * 1e6:.0f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.3g} ms"


def row(info: dict, peak: float) -> str:
    """Return one case as a row of the table."""
    medians = {name: times["median"] for name, times in info["arms"].items()}
    ours, spread = medians.pop("fused"), info["arms"]["fused"]
    best = min(medians, key=medians.get)
    rate = info["flops"] / ours * 1e-9
    cells = [
        info["subject"],
        info["mode"],
        str(info["batch"]),
        f"{duration(ours)} ({duration(spread['p20'])} to {duration(spread['p80'])})",
        duration(medians["eager"]),
        f"**{medians['eager'] / ours:.1f}**",
        f"{medians[best] / ours:.1f} ({best})",
        f"{rate:.0f} ({rate / peak:.0%})",
    ]
    return f"| {' | '.join(cells)} |"


def table(results: dict) -> str:
    """Return the results as Markdown: a line about the machine, and a row for each case."""
    machine = results["machine_info"]
    lines = [
        f"{machine['cpu']}, {machine['isa']}, one thread, {machine['precision']}, torch {machine['torch']}; commit `{results['commit_info']['id'][:10]}`. "
        f"Medians of arms timed in turn (20th to 80th percentile); peak {machine['peak_gflops']:.0f} GFLOP/s, measured in the same run.",
        "",
        "| layer | mode | B | fused | eager | x eager | x best PyTorch | GFLOP/s (of peak) |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
        *(row(entry["extra_info"], machine["peak_gflops"]) for entry in results["benchmarks"]),
    ]
    return "\n".join(lines)


def replace_between(text: str, content: str) -> str:
    """Return `text` with `content` between the two markers. Raises: ValueError if one of them is missing."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"README.md: expected the lines {BEGIN!r} and {END!r} once each, got {text.count(BEGIN)} and {text.count(END)}")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{content}\n\n{END}{rest.split(END)[1]}"


def main() -> int:
    """Write the table; return the exit status: 2 where there is nothing to report yet."""
    source, readme = ROOT / "bench/results/cpu.json", ROOT / "README.md"
    if not source.exists():
        print(f"report: expected {source.relative_to(ROOT)}, found none; run `make bench` first", file=sys.stderr)
        return 2
    readme.write_text(replace_between(readme.read_text(), table(json.loads(source.read_text()))))
    print(f"README.md: {len(json.loads(source.read_text())['benchmarks'])} cases")
    return 0


if __name__ == "__main__":
    sys.exit(main())
