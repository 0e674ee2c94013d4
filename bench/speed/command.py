"""`python -m fusedmoe bench`: parse the command line, measure under a progress bar, print a table,
save the JSON.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from fusedmoe.backends import BACKENDS, require
from fusedmoe.speed import own_model, results
from fusedmoe.speed.arms import Session
from fusedmoe.speed.calls import MODES
from fusedmoe.speed.case import OURS, Case
from fusedmoe.speed.grids import DTYPES, GRIDS, Cell
from fusedmoe.speed.machine import describe
from fusedmoe.speed.measuring import ROUNDS, processors
from fusedmoe.speed.overhead import overhead
from fusedmoe.speed.runtimes import Absent
from fusedmoe.speed.subjects import CLASSES, SUBJECTS, Sizes, build

SHORT = {"fp32": "float32", "bf16": "bfloat16"}
DEFAULT_BATCHES = (1, 64, 1024)
# Columns of a table that goes into a file.
WIDE = 180


def numbers(text: str) -> tuple[int, ...]:
    """Return the positive integers between commas. Raises: ArgumentTypeError for anything else."""
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"expected whole numbers of at least 1, separated by commas, got {text!r}")
    return tuple(map(int, parts))


def number(text: str) -> int:
    """Return one positive integer. Raises: ArgumentTypeError for anything else."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def widths(text: str) -> tuple[tuple[int, ...], ...]:
    """Return the layer widths of an expert per level: levels between commas, layers joined by
    hyphens.

    Raises: ArgumentTypeError.
    """
    try:
        return tuple(numbers(level.replace("-", ",")) for level in text.split(","))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"expected widths like 512,256 (two levels) or 256-128 (one level of two layers), got {text!r}"
        ) from None


def dtypes(text: str) -> tuple[str, ...]:
    """Return dtypes by PyTorch's names. Raises: ArgumentTypeError for one that is not measured."""
    names = tuple(SHORT.get(name, name) for name in text.split(","))
    if not set(names) <= set(DTYPES):
        raise argparse.ArgumentTypeError(
            f"expected {', '.join(DTYPES)} or {', '.join(SHORT)}, separated by commas, got {text!r}"
        )
    return names


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = argparse.ArgumentParser(
        prog="fusedmoe bench", description="Time the fused layers against everything a user could pick instead."
    )
    what = result.add_argument_group("what to measure (default: --grid quick)").add_mutually_exclusive_group()
    what.add_argument(
        "--quick", action="store_const", const="quick", dest="grid", help="the three main layers, a few minutes"
    )
    what.add_argument("--grid", choices=GRIDS, help="quick; floors: what the backend's floors name; all: hours")
    what.add_argument(
        "--layer",
        choices=SUBJECTS,
        metavar="NAME",
        action="append",
        help=f"one of {'; '.join(SUBJECTS)}; may be repeated",
    )
    what.add_argument(
        "--family", choices=CLASSES, metavar="FAMILY", help=f"sizes of your own, of one of {', '.join(CLASSES)}"
    )
    what.add_argument(
        "--model",
        metavar="PACKAGE.MODULE:FACTORY",
        help="your own model: a function that returns (model, inputs), and may take the rows",
    )
    sizes = result.add_argument_group("sizes, for --family")
    sizes.add_argument("--tasks", type=number, default=3, help="(default: %(default)s)")
    sizes.add_argument("--input", type=number, default=256, help="width of x (default: %(default)s)")
    sizes.add_argument(
        "--experts",
        type=widths,
        default=((256,), (128,)),
        metavar="WIDTHS",
        help="levels by commas, layers by hyphens (default: 256,128)",
    )
    sizes.add_argument(
        "--task-experts", type=number, default=2, help="experts of a task on each level (default: %(default)s)"
    )
    sizes.add_argument("--shared-experts", type=number, default=1, help="(default: %(default)s)")
    sizes.add_argument(
        "--total-experts", type=number, default=8, help="experts of a level where tasks own none (default: %(default)s)"
    )
    how = result.add_argument_group("how (a grid brings its own; --layer, --family and --model take these)")
    how.add_argument("--batch", type=numbers, metavar="ROWS", help="for instance 1,64 (default: 1,64,1024)")
    how.add_argument("--mode", choices=MODES, action="append", help="may be repeated (default: both)")
    how.add_argument("--dtype", type=dtypes, help="float32 or fp32, bfloat16 or bf16 (default: float32)")
    how.add_argument("--threads", type=numbers, help="for instance 1,2 (default: 1)")
    how.add_argument(
        "--backend",
        default="auto",
        help=f"of the fused arms: auto, {', '.join(row.name for row in BACKENDS)} (default: %(default)s)",
    )
    how.add_argument("--no-compile", action="store_true", help="without the arms that must be compiled first")
    how.add_argument("--rounds", type=number, default=ROUNDS, help="turns of each arm (default: %(default)s)")
    result.add_argument("--json", type=Path, metavar="FILE", help="save the results, after every case")
    result.add_argument("--resume", action="store_true", help="keep the cases that FILE has, and measure the others")
    return result


def cells_of(options: argparse.Namespace) -> list[Cell]:
    """Return the cases that the command line asks for.

    Raises: ValueError, saying what was expected and what came.
    """
    given = [name for name in ("batch", "mode", "dtype", "threads") if getattr(options, name)]
    if not (options.layer or options.family):
        if given:
            raise ValueError(
                f"--{given[0]}: expected with --layer, --family or --model,"
                f" got the grid {options.grid or 'quick'}, which brings its own"
            )
        chosen = GRIDS[options.grid or "quick"]()
        return [cell._replace(compiled=False) for cell in chosen] if options.no_compile else chosen
    layers = {name: SUBJECTS[name] for name in options.layer or ()}
    if options.family:
        sizes = Sizes(
            options.family,
            options.tasks,
            options.input,
            options.experts,
            options.task_experts,
            options.shared_experts,
            options.total_experts,
        )
        build(sizes)
        layers = {options.family: sizes}
    asked = product(
        options.threads or (1,),
        options.dtype or ("float32",),
        layers,
        options.mode or MODES,
        options.batch or DEFAULT_BATCHES,
    )
    return [
        Cell(name, layers[name], mode, batch, dtype, threads, not options.no_compile)
        for threads, dtype, name, mode, batch in asked
    ]


def check(options: argparse.Namespace, threads: Sequence[int]) -> None:
    """Raise ValueError or RuntimeError for a backend, or a number of threads, that this machine
    cannot run.
    """
    require(options.backend)
    own = len(processors())
    if max(threads, default=1) > own:
        raise ValueError(f"threads: expected at most {own}, the processors of this process, got {max(threads)}")
    if options.resume and not options.json:
        raise ValueError("--resume: expected --json FILE, got none")


def table_of(records: Sequence[dict], peak: float | None) -> Table:
    """Return the results as a table for the terminal."""
    table = Table(title="milliseconds, medians; x: how many times as long the other takes", title_justify="left")
    for name in (
        "layer",
        "mode",
        "B",
        "dtype",
        "threads",
        *OURS,
        "eager",
        "x eager",
        "x best on the layer",
        "x best of all",
        "of peak",
    ):
        table.add_column(name, justify="left" if name in ("layer", "mode", "dtype") else "right")
    for record in records:
        times = [
            f"{1e3 * record['arms'][name]['median']:.3f}" if name in record["arms"] else "-"
            for name in (*OURS, "eager")
        ]
        found, share = results.ratios(record), results.share_of_peak(record, peak)
        ratios = [f"{found[name].times:.2f}" if name in found else "-" for name in ("eager", "reference", "best")]
        named = [
            f"{text} ({found[name].arm})" if name in found else text
            for text, name in zip(ratios[1:], ("reference", "best"), strict=True)
        ]
        asked = (record["layer"], record["mode"], str(record["batch"]), record["dtype"], str(record["threads"]))
        table.add_row(*asked, *times, ratios[0], *named, "-" if share is None else f"{share:.0%}")
    return table


def absent_arms(records: Sequence[dict]) -> list[str]:
    """Return a line for every reason why arms did not run: which, and in how many cases."""
    found: dict[str, dict[str, int]] = {}
    for record in records:
        for name, reason in record["absent"].items():
            found.setdefault(reason, {})[name] = found.get(reason, {}).get(name, 0) + 1
    named = {
        reason: "; ".join(f"{name} ({count} of {len(records)} cases)" for name, count in arms.items())
        for reason, arms in found.items()
    }
    return [f"{arms}: {reason}" for reason, arms in named.items()]


def measure_cells(
    cells: Sequence[Cell], options: argparse.Namespace, console: Console, machine: dict, records: list[dict]
) -> None:
    """Measure the cases that `records` lacks, and append theirs, under a progress bar.

    Save after each case if there is a file.
    """
    known = {results.cell_of(record).key for record in records}
    cells = [cell for cell in cells if cell.key not in known]
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Session(options.backend) as session, Progress(*columns, console=console, expand=True) as bar:
        try:
            costs = overhead(session, options.rounds)
        except Absent as error:
            costs = {"absent": str(error)}
        task = bar.add_task("", total=len(cells))
        for cell in cells:

            def say(what: str, cell: Cell = cell) -> None:
                bar.update(task, description=f"{cell.name}: [cyan]{what}[/cyan]")

            records.append(results.run(Case(cell, session, say), options.rounds, say))
            bar.advance(task)
            if options.json:
                # The best that was seen: a share of the peak must not gain from a slow moment in
                # which the peak was measured.
                machine["peak_gflops"] = max(
                    (r["peak_gflops"] for r in records if r["peak_gflops"]), default=machine["peak_gflops"]
                )
                results.save(options.json, machine, costs, records)


def measure_own(factory: Callable, options: argparse.Namespace, console: Console) -> None:
    """Measure one's own model for every batch size and number of threads, and print what was fused
    and the times.
    """
    table = Table(
        "rows", "threads", "mode", "fused, ms", "eager, ms", "x eager", title=options.model, title_justify="left"
    )
    for threads, rows in product(options.threads or (1,), options.batch or DEFAULT_BATCHES):
        with console.status(f"{rows} rows, {threads} threads"):
            report, times = own_model.measure_model(factory, rows, threads, options.backend, options.rounds)
        if not table.rows:
            console.print(str(report), markup=False)
        for mode, arms in times.items():
            ours, plain = arms["fused"].median, arms["eager"].median
            table.add_row(
                str(rows), str(threads), mode, f"{1e3 * ours:.3f}", f"{1e3 * plain:.3f}", f"{plain / ours:.2f}"
            )
    if table.rows:
        console.print(table)


def main(arguments: Sequence[str]) -> int:
    """Measure and print; return the exit status: 2 for what cannot be measured, 1 for what is
    wrong.
    """
    options = parser().parse_args(arguments)
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDE)
    try:
        cells = [] if options.model else cells_of(options)
        factory = own_model.load(options.model) if options.model else None
        check(options, [cell.threads for cell in cells] or options.threads or (1,))
        with console.status("measuring what the machine reaches"):
            machine = describe()
        records = results.finished(options.json, machine) if options.resume else []
        if factory:
            measure_own(factory, options, console)
            return 0
    except (ValueError, RuntimeError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except AssertionError as error:
        print(f"bench: {options.model}: not timed, since fused it computes something else: {error}", file=sys.stderr)
        return 1
    try:
        measure_cells(cells, options, console, machine, records)
    except AssertionError as error:
        print(f"bench: not timed, since it computes something else: {error}", file=sys.stderr)
        return 1
    console.print(table_of(records, machine["peak_gflops"]))
    for line in absent_arms(records):
        console.print(f"absent: {line}", markup=False)
    return 0
