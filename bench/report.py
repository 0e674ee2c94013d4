"""Write README's speeds, docs/speed.md and its pictures from bench/results/cpu.json: `make report`.
No figure is typed by hand.
"""

from __future__ import annotations

import math
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from tables import replace_between, rows_of

from fusedmoe.speed.case import OURS
from fusedmoe.speed.command import absent_arms
from fusedmoe.speed.results import load, ratios, share_of_peak
from fusedmoe.speed.subjects import MAIN

ROOT = Path(__file__).parent.parent
SOURCE, README, PAGE = ROOT / "bench/results/cpu.json", ROOT / "README.md", ROOT / "docs/speed.md"
BEGIN, END = "<!-- speeds: written by `make report` -->", "<!-- end of speeds -->"
MEGA = 1e6
# Rows of README's one table.
HEADLINE_BATCH = 64
# Columns of a page.
WIDTH = 100


def paragraph(text: str) -> str:
    """Return a text in lines of a page's width."""
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def milliseconds(seconds: float) -> str:
    """Return seconds as milliseconds with three digits."""
    value = 1e3 * seconds
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def threads_of(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def groups(records: Sequence[Mapping], *names: str) -> dict[tuple, list[Mapping]]:
    """Return the records by the values of some of their fields, in the order in which they were
    measured.
    """
    found: dict[tuple, list[Mapping]] = {}
    for record in records:
        found.setdefault(tuple(record[name] for name in names), []).append(record)
    return found


def commit_of(machine: Mapping) -> str:
    return (
        f"commit "
        f"`{machine['commit'].get('id', 'unknown')[:10]}`{' with changes' if machine['commit'].get('dirty') else ''}"
    )


def machine_line(results: Mapping) -> str:
    """Return a paragraph about the machine, what it reaches, and what the figures are."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    rounds = min(record["rounds"] for record in results["cases"])
    speeds = ", ".join(f"{name} {speed:.0f}" for name, speed in machine["read_gb_per_second"].items())
    reads = f" Reads of one core, in GB/s: {speeds}." if speeds else ""
    medium = (
        ""
        if machine["medium_computes_in"] == "float32"
        else ' "medium" computes in bfloat16 here, so it is a rival of bfloat16 alone.'
    )
    return paragraph(
        f"{machine['cpu']}, {machine['isa']}; {commit_of(machine)}; {versions}. Times are medians of {rounds} "
        f"rounds or more, in which ours and the "
        f"rivals take turns. The peak is {machine['peak_gflops']:.0f} GFLOP/s: the float32 multiply-adds of "
        f"one core, measured in the same run."
        f"{reads}{medium}"
    )


def summary(record: Mapping, ours: str, peak: float) -> str:
    """Return `x eager / x best on the layer / x best of all, share of peak`.

    Only the share where no rival is.
    """
    found, share = ratios(record, ours), share_of_peak(record, peak, ours)
    if share is None:
        return ""
    times = " / ".join(f"{found[name].times:.1f}" for name in ("eager", "reference", "best") if name in found)
    return (
        f"**{times.split(' / ')[0]}**{times[times.index(' /') :] if ' /' in times else ''}, {share:.0%}"
        if times
        else f"{share:.0%}"
    )


def compact(records: Sequence[Mapping], peak: float) -> list[str]:
    """Return one table: a row for each layer, mode and arm of ours, a column for each batch size."""
    batches = sorted({record["batch"] for record in records})
    table = [["layer, mode", *(f"B = {batch}" for batch in batches)]]
    for (layer, mode), cases in groups(records, "layer", "mode").items():
        for ours in OURS:
            by_batch = {record["batch"]: summary(record, ours, peak) for record in cases}
            if any(by_batch.values()):
                name = f"{layer}, {mode}{', frozen' if ours != 'fused' else ''}"
                table.append([name, *(by_batch.get(batch, "") for batch in batches)])
    return rows_of(table) if len(table) > 1 else []


def against_own(records: Sequence[Mapping], field: str, base: object, other: object) -> list[str]:
    """Return lines that compare the fused arm with itself: the other dtype or number of threads
    against the base, case by case.
    """
    lines = []
    keys = [name for name in ("layer", "mode", "batch", "dtype", "threads") if name != field]
    for cases in groups(records, *keys).values():
        found = {record[field]: record["arms"]["fused"]["median"] for record in cases if "fused" in record["arms"]}
        if base in found and other in found:
            lines.append(
                f"{cases[0]['layer']}, {cases[0]['mode']}, B = {cases[0]['batch']}: {found[base] / found[other]:.2f}"
            )
    return lines


def memory_table(records: Sequence[Mapping]) -> list[str]:
    """Return a table of the bytes kept for backward and the rise of the peak, of the largest batch
    of each layer and dtype.
    """
    table = [
        ["layer, dtype, B", "saved, MB", "eager", "ratio", "ratio, recompute", "peak memory rises by, MB", "eager"]
    ]
    for (layer, dtype), cases in groups(
        [r for r in records if "fused" in r.get("memory", {})], "layer", "dtype"
    ).items():
        largest = max(cases, key=lambda record: record["batch"])
        ours, eager = largest["memory"]["fused"], largest["memory"]["eager"]
        peaks = ["-" if side["peak_bytes"] is None else f"{side['peak_bytes'] / MEGA:.1f}" for side in (ours, eager)]
        least = largest["memory"].get("fused, recompute")
        ratios = [
            "-" if side is None else f"{side['saved_bytes'] / eager['saved_bytes']:.2f}" for side in (ours, least)
        ]
        saved = [f"{side['saved_bytes'] / MEGA:.2f}" for side in (ours, eager)]
        table.append([f"{layer}, {dtype}, {largest['batch']}", *saved, *ratios, *peaks])
    return rows_of(table) if len(table) > 1 else []


def overhead_line(results: Mapping) -> str:
    """Return a sentence about what a call costs besides its arithmetic.

    Empty where it was not measured.
    """
    arms = results["overhead"].get("arms")
    if not arms:
        return ""
    forward, step, cat = (f"{1e6 * arms[name]['median']:.1f}" for name in ("forward", "forward, backward", "torch.cat"))
    return paragraph(
        f"The overhead of a call: one with {results['overhead']['tensors']} tensors and almost no arithmetic "
        f"takes {forward} us without gradients, "
        f"and {step} us forward and backward. For comparison, `torch.cat` of as many tensors, forward and "
        f"backward, takes {cat} us."
    )


def headline(records: Sequence[Mapping]) -> list[str]:
    """Return README's table: times as fast as eager of the main layers, in float32 on one thread,
    at HEADLINE_BATCH rows.
    """
    found = [
        record
        for record in records
        if (record["dtype"], record["threads"]) == ("float32", 1) and "eager" in ratios(record)
    ]
    chosen = [record for record in found if record["batch"] == HEADLINE_BATCH and record["layer"] in MAIN]
    if not chosen:
        return []
    table = [["layer, mode", "times as fast as eager PyTorch"]]
    table += [[f"{record['layer']}, {record['mode']}", f"**{ratios(record)['eager'].times:.1f}**"] for record in chosen]
    best = [ratios(record)["best"].times for record in chosen]
    single = [
        ratios(record)["best"].times
        for record in found
        if record["batch"] == 1 and record["layer"] in MAIN and record["mode"] == "inference"
    ]
    slower = "it is slower: " if single and max(single) < 1 else ""
    at_one = f"; at B = 1, in inference, {slower}{min(single):.1f} to {max(single):.1f} times" if single else ""
    return [
        *rows_of(table),
        "",
        paragraph(
            f"B = {HEADLINE_BATCH} rows, float32, one thread. T3: three tasks; m2: two experts of each; s1: one shared "
            f"expert; e8: eight experts in all. The rivals include the same network rewritten by hand as a few large "
            f"matrix products. Against the fastest rival, fusedmoe is {min(best):.1f} to {max(best):.1f} times as fast "
            f"in these cases{at_one}."
        ),
        "",
    ]


def readme(results: Mapping, pictures: Sequence[str] = ()) -> str:
    """Return what README shows: one number for each main layer and mode, the machine, a picture."""
    machine = results["machine"]
    measured = (
        f"Measured on {machine['cpu']}, {machine['isa']}, torch {machine['versions']['torch']}, {commit_of(machine)}."
    )
    more = "has every layer, batch size, dtype and rival, and names what could not run, with the reason."
    lines = [*headline(results["cases"]), paragraph(f"{measured} [docs/speed.md]({PAGE.relative_to(ROOT)}) {more}")]
    if "speed" in pictures:
        lines += ["", "![Times as fast as eager, and as the best rival, against the number of rows](docs/speed.png)"]
    return "\n".join(lines)


def overview(results: Mapping) -> list[str]:
    """Return a compact table for each dtype and number of threads, with what its cells say."""
    lines = [
        paragraph(
            "A cell has up to three ratios and the share of the peak. The ratios say how many times as fast "
            "fusedmoe is **as eager PyTorch** / as the "
            "fastest rival that runs the layer as it is / as the fastest of all rivals, which also run the "
            "network rewritten by hand (restructured). "
            "Only rivals that compute in the table's dtype count."
        )
    ]
    for (dtype, threads), cases in groups(results["cases"], "dtype", "threads").items():
        table = compact(cases, results["machine"]["peak_gflops"])
        lines += ["", f"{dtype}, {threads_of(threads)}:", "", *table] if table else []
    return lines


def full_table(records: Sequence[Mapping]) -> list[str]:
    """Return every arm's time: a row for each layer and batch size, a column for each arm that ran
    in any of them.
    """
    arms = list(dict.fromkeys(name for record in records for name in record["arms"]))
    table = [["layer, B", *arms]]
    for record in records:
        times = {}
        for name, arm in record["arms"].items():
            other = "" if arm["precision"] == record["dtype"] else f" ({arm['precision']})"
            times[name] = (
                f"{milliseconds(arm['median'])} [{milliseconds(arm['p20'])}, {milliseconds(arm['p80'])}]{other}"
            )
        table.append([f"{record['layer']}, {record['batch']}", *(times.get(name, "-") for name in arms)])
    return rows_of(table)


def page(results: Mapping, pictures: Sequence[str] = ()) -> str:
    """Return docs/speed.md: ratios, all cases and all arms, what was absent, memory."""
    records = results["cases"]
    lines = [
        "# Speed on a CPU",
        "",
        "Written by `make report` from bench/results/cpu.json.",
        "",
        machine_line(results),
        "",
        *overview(results),
    ]
    for name in pictures:
        lines += ["", f"![{name}]({name}.png)"]
    lines += ["", "## Every case and every rival", ""]
    lines += [
        paragraph(
            "In milliseconds: the median [20th and 80th percentile]. The precision stands behind it where it "
            "is not the table's dtype."
        )
    ]
    for (dtype, threads, mode), cases in groups(records, "dtype", "threads", "mode").items():
        lines += ["", f"### {mode}, {dtype}, {threads_of(threads)}", "", *full_table(cases)]
    comparisons = {
        "How many times as fast fusedmoe is in bfloat16 as in float32": against_own(
            records, "dtype", "float32", "bfloat16"
        ),
        "How many times as fast fusedmoe is on two threads as on one": against_own(records, "threads", 1, 2),
        "What did not run, and why": absent_arms(records),
    }
    for title, found in comparisons.items():
        lines += ["", f"## {title}", "", *(f"- {line}" for line in found)] if found else []
    memory = memory_table(records)
    lines += ["", "## Memory of a training step", "", *memory] if memory else []
    return "\n".join([*lines, *(["", overhead_line(results)] if overhead_line(results) else [])]) + "\n"


def main() -> int:
    """Write tables and pictures; return the exit status: 2 where there is nothing to report yet."""
    if not SOURCE.exists():
        print(f"report: expected {SOURCE.relative_to(ROOT)}, found none; run `make bench` first", file=sys.stderr)
        return 2
    # Beside this file; only here, so that the tables can be read without matplotlib.
    from pictures import draw

    results = load(SOURCE)
    drawn = draw(results, PAGE.parent)
    PAGE.write_text(page(results, drawn))
    README.write_text(replace_between(README.read_text(), readme(results, drawn), BEGIN, END, README.name))
    print(f"README.md, {PAGE.relative_to(ROOT)}: {len(results['cases'])} cases; pictures: {', '.join(drawn) or 'none'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
