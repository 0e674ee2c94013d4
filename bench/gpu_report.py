"""Write bench/results/gpu.md from bench/results/gpu.json: `make gpu-report`. What was not measured
is not in it.

python bench/gpu_report.py [--json bench/results/gpu.json]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from gpu_parts import PARTS

# What a median carries.
DIGITS = 3


def number(value: float) -> str:
    """Return a figure with three digits, without an exponent."""
    text = f"{value:.{DIGITS}g}"
    return f"{float(text):g}" if "e" not in text else f"{float(text):.0f}"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Return the lines of a Markdown table, or none without rows."""
    if not rows:
        return []
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    return [lines[0], "|---|" + "---:|" * (len(head) - 1), *lines[1:], ""]


def clean(text: str) -> str:
    """An error in one cell or line of a list."""
    return " ".join(text.split()).replace("|", "/")


def facts(results: dict[str, dict]) -> list[str]:
    """Part a: what was found, a line each."""
    lines = []
    for key, result in results.items():
        words = ", ".join(
            f"{name} {clean(json.dumps(value)) if isinstance(value, dict) else value}" for name, value in result.items()
        )
        lines.append(f"- {key}: {words}")
    return [*lines, ""]


def parity(results: dict[str, dict]) -> list[str]:
    """Part b: how many cases passed by dtype and backend, and the self-tests' figures."""
    counts: dict[tuple[str, ...], int] = {}
    lines = []
    for key, result in results.items():
        *_, dtype, backend = ("", "", *key.split(", "))[-3:]
        if "worst" in result:
            lines.append(f"- {key}: {number(result['worst'])} times the error allowed, at most")
        elif "values" in result:
            counts[dtype, backend] = counts.get((dtype, backend), 0) + 1
        else:
            lines.append(f"- {key}: {clean(result.get('said', ''))}")
    return [
        *lines,
        *(f"- parity, {dtype}, {backend}: {count} cases passed" for (dtype, backend), count in counts.items()),
        "",
    ]


def times(results: dict[str, dict]) -> list[str]:
    """Part c: a table a layer, mode and dtype, an arm a row and the batch sizes as columns: device
    milliseconds / host microseconds."""
    groups: dict[tuple[str, str, str], dict[str, dict[int, str]]] = {}
    for result in results.values():
        cell = result["cell"]
        arms = groups.setdefault((cell["layer"], cell["mode"], cell["dtype"]), {})
        for arm, found in result["arms"].items():
            text = f"{number(found['device_ms'])} / {number(found['host_us'])}" if "device_ms" in found else "failed"
            text = f"{text} (wrong)" if "device_ms" in found and "error" in found else text
            # Eager and ours are in several cases of a cell: the one with most arms came first.
            arms.setdefault(arm, {}).setdefault(cell["rows"], text)
    lines = []
    for (layer, mode, dtype), arms in groups.items():
        sizes = sorted({rows for found in arms.values() for rows in found})
        lines += [f"{layer}, {mode}, {dtype}: milliseconds of the device / microseconds of the host", ""]
        lines += table(
            ["", *(f"B = {rows}" for rows in sizes)],
            [[arm, *(found.get(rows, "") for rows in sizes)] for arm, found in arms.items()],
        )
    return lines + failures(
        (f"{key}, {arm}", found) for key, result in results.items() for arm, found in result["arms"].items()
    )


def shares(results: dict[str, dict]) -> list[str]:
    """Part d."""
    lines = []
    ceilings = results.get("ceilings")
    if ceilings:
        copy, rate = (ceilings[name] * 1e-12 for name in ("copy_bytes_per_second", "bfloat16_flops_per_second"))
        lines = [
            f"Measured: a copy moves {number(copy)} TB/s, read and written; a matrix product in bfloat16 runs "
            f"at {number(rate)} TFLOP/s.",
            "",
        ]
    rows = [
        [
            key,
            number(1e3 * found["seconds"]),
            f"{found['of_bandwidth']:.1%}",
            f"{found['of_matrix_rate']:.1%}",
            clean(found["how"]),
        ]
        for key, found in results.items()
        if key != "ceilings"
    ]
    return lines + table(["", "ms", "of bandwidth, each tensor once", "of the matrix rate", "timed"], rows)


def tools(results: dict[str, dict]) -> list[str]:
    """Part e."""
    lines = [f"- {key}: {clean(found['summary'])}" for key, found in results.items() if "summary" in found]
    for key, found in results.items():
        for kernel, columns in found.get("kernels", {}).items():
            lines += [
                "",
                f"{key}, `{clean(kernel)}`:",
                "",
                *table(["", "value"], [[name, value] for name, value in columns.items()]),
            ]
    return [*lines, ""]


def tuning(results: dict[str, dict]) -> list[str]:
    """Part f."""
    rows = []
    for key, found in results.items():
        tried = sum(len(chosen["milliseconds"]) for chosen in found["chosen"].values())
        rows.append([key, *(number(found[name]) for name in ("shipped_ms", "tuned_ms", "tuning_seconds")), str(tried)])
    return table(["", "shipped, ms", "tuned, ms", "tuning, s", "tiles tried"], rows)


SECTIONS: dict[str, Callable[[dict[str, dict]], list[str]]] = {
    "a": facts,
    "b": parity,
    "c": times,
    "d": shares,
    "e": tools,
    "f": tuning,
}


def failures(results: Iterator[tuple[str, dict]]) -> list[str]:
    """What has no figures, and why."""
    lines = [
        f"- {key}: {kind}: {clean(found[kind])}"
        for key, found in results
        for kind in ("error", "skipped")
        if kind in found
    ]
    return ["Without a result:", "", *lines, ""] if lines else []


def report(content: dict) -> str:
    """Return the page."""
    head, lines = content["head"], ["# What `make gpu` measured", ""]
    if head:
        build = head["build"]
        where = f"{head['device']['name']}; Python {head['python']}; commit {head['commit']}; {head['began']} UTC"
        lines.append(f"{where}; built for {build['kind']} in {build['seconds']} s.")
        lines += [f"Without the CUDA kernels: {clean(build['absent'])}."] if build["absent"] else []
        lines.append("")
    for letter, part in content["parts"].items():
        lines += [f"## {letter}: {PARTS[letter].title}", "", f"{part['status']}; {part['seconds']} s.", ""]
        found = {
            key: result for key, result in part["results"].items() if "error" not in result and "skipped" not in result
        }
        if found:
            lines += SECTIONS[letter](found)
        lines += failures(iter(part["results"].items()))
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--json", type=Path, default=Path("bench/results/gpu.json"), help="what `make gpu` wrote (default: %(default)s)"
    )
    options = parser.parse_args()
    page = options.json.with_suffix(".md")
    page.write_text(report(json.loads(options.json.read_text())))
    print(page)


if __name__ == "__main__":
    main()
