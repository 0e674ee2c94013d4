"""Write README's table of speeds from bench/results/cpu.json: `make report`. No figure in README is typed by hand."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- speeds: written by `make report` -->", "<!-- end of speeds -->"


def milliseconds(seconds: float) -> str:
    """Return seconds as milliseconds with three digits."""
    value = 1e3 * seconds
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def row(info: dict) -> str:
    """Return one case as a row of the table."""
    medians = {name: times["median"] for name, times in info["arms"].items()}
    ours, spread = medians.pop("fused"), info["arms"]["fused"]
    best = min(medians, key=medians.get)
    cells = [
        info["subject"],
        info["mode"],
        str(info["batch"]),
        f"{milliseconds(ours)} ({milliseconds(spread['p20'])} to {milliseconds(spread['p80'])})",
        milliseconds(medians["eager"]),
        f"**{medians['eager'] / ours:.1f}**",
        f"{medians[best] / ours:.1f} ({best})",
        f"{info['share_of_peak']:.0%}",
    ]
    return f"| {' | '.join(cells)} |"


def table(results: dict) -> str:
    """Return the results as Markdown: a line about the machine, and a row for each case."""
    machine, commit = results["machine_info"], results["commit_info"]
    cases = [entry["extra_info"] for entry in results["benchmarks"]]
    arms = dict.fromkeys(name for info in cases for name in info["arms"] if name != "fused")
    lines = [
        f"{machine['cpu']}, {machine['isa']}, {machine['threads']} thread, {machine['precision']}; torch {machine['torch']}, Python {machine['python']}, "
        f"fusedmoe {machine['fusedmoe']} at commit `{commit['id'][:10]}`{' with changes' if commit.get('dirty') else ''}. Medians of arms timed in turn "
        f"(20th to 80th percentile), in milliseconds. `x best` is over the fastest of: {'; '.join(arms)}. "
        f"Peak: {machine['peak_gflops']:.0f} GFLOP/s of multiply-adds, measured in the same run.",
        "",
        "| layer | mode | B | fused, ms | eager, ms | x eager | x best | of peak |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
        *map(row, cases),
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
