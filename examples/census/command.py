"""`python -m fusedmoe demo`: parse the command line, train both arms under a progress bar, print
the table, save the picture.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from fusedmoe.demo import census, synthetic
from fusedmoe.demo.dataset import Dataset
from fusedmoe.demo.model import MODELS
from fusedmoe.demo.outcome import Outcome, as_rich
from fusedmoe.demo.picture import draw
from fusedmoe.demo.training import (
    BATCH,
    INFERENCE_ROUNDS,
    Arm,
    compare,
    make_arms,
    mixing_weights,
    time_inference,
    train,
)
from fusedmoe.nn.wiring import central

SOURCES = {"census": census.load, "synthetic": synthetic.load}
# A wheel has the code of this package and not its data.
NO_DATA = (
    "demo: this installation does not contain the Census-Income data; download"
    " examples/census/census-income.test.gz from the repository of fusedmoe and type"
    " `python -m fusedmoe demo --data census-income.test.gz`, or train on made-up rows with"
    " `--data synthetic`."
)
EPOCHS = 8
QUICK_STEPS = 30


def family(text: str) -> str:
    """Return the name of the family that `text` names, hyphens or underscores.

    Raises: ArgumentTypeError listing the families.
    """
    name = text.lower().replace("-", "_")
    if name not in MODELS:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(MODELS)}, got {text!r}")
    return name


def count(text: str) -> int:
    """Return a positive integer. Raises: ArgumentTypeError for anything else."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def source(text: str) -> str:
    """Return a name of `SOURCES` or the path of a file.

    Raises: ArgumentTypeError for anything else.
    """
    if text not in SOURCES and not Path(text).is_file():
        raise argparse.ArgumentTypeError(
            f"expected {', '.join(SOURCES)} or a copy of {census.SOURCE.name}, got {text!r}, which is no file"
        )
    return text


def load(data: str, seed: int) -> Dataset:
    """Read what `--data` names.

    Raises: ValueError or OSError for a file that does not hold the rows of Census-Income.
    """
    return SOURCES[data](seed) if data in SOURCES else census.load(seed, Path(data))


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = argparse.ArgumentParser(
        prog="fusedmoe demo",
        description="Train one multi-task model twice from one seed, plain and fused, and compare.",
    )
    result.add_argument(
        "--model",
        type=family,
        default="adatt_sp",
        metavar="FAMILY",
        help=f"one of {', '.join(MODELS)} (default: %(default)s)",
    )
    what = f"what to train on: {', '.join(SOURCES)}, or a copy of {census.SOURCE.name} (default: %(default)s)"
    result.add_argument("--data", type=source, default="census", help=what)
    length = result.add_mutually_exclusive_group()
    length.add_argument(
        "--epochs", type=count, default=EPOCHS, help="passes over the training rows (default: %(default)s)"
    )
    length.add_argument("--steps", type=count, help="training steps, in place of epochs")
    length.add_argument(
        "--quick", action="store_const", const=QUICK_STEPS, dest="steps", help=f"the same as --steps {QUICK_STEPS}"
    )
    result.add_argument(
        "--threads", type=count, default=torch.get_num_threads(), help="threads of torch (default: %(default)s)"
    )
    result.add_argument(
        "--seed", type=int, default=0, help="of the split, the weights and the order of rows (default: %(default)s)"
    )
    result.add_argument(
        "--picture", type=Path, default=Path("build/demo.png"), help="where to save the picture (default: %(default)s)"
    )
    return result


def run(model: str, data: Dataset, steps: int, seed: int, console: Console) -> Outcome:
    """Train both arms, time inference, compare them, and read the mixing weights of the fused one,
    under a progress bar.
    """
    plain, fused = make_arms(data, model, seed)
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(None),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        expand=True,
    )
    with bar:
        task = bar.add_task("training", total=steps)
        train((plain, fused), data, steps, seed, lambda: bar.update(task, advance=1, description=status(plain, fused)))
        task = bar.add_task("inference", total=INFERENCE_ROUNDS)
        time_inference((plain, fused), data, INFERENCE_ROUNDS, lambda: bar.advance(task))
    outputs, gradients = compare(plain.model, data)
    return Outcome(
        model,
        data,
        plain,
        fused,
        outputs,
        gradients,
        central(fused.model.network).table,
        mixing_weights(fused.model, data.test),
    )


def status(plain: Arm, fused: Arm) -> str:
    """Say how the last step of both arms went: milliseconds and loss."""
    times = f"{1e3 * plain.step_seconds[-1]:.0f} | {1e3 * fused.step_seconds[-1]:.0f} ms"
    losses = f"{plain.losses[-1]:.4f} | {fused.losses[-1]:.4f}"
    return f"plain | fused [cyan]{times}[/cyan] loss [green]{losses}[/green]"


def main(arguments: Sequence[str]) -> int:
    """Run the demonstration; return the exit status: 2 where the data cannot be read."""
    options = parser().parse_args(arguments)
    if options.data == "census" and not census.SOURCE.exists():
        print(NO_DATA, file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    console = Console()
    try:
        with console.status(f"reading the {options.data} data"):
            data = load(options.data, options.seed)
    except (OSError, EOFError, ValueError) as error:
        print(f"demo: --data {options.data}: {error}", file=sys.stderr)
        return 2
    parts = f"{len(data.train):,} rows to train on, {len(data.validation):,} to validate, {len(data.test):,} to test"
    console.print(f"{data.name}: {parts}; tasks {', '.join(data.tasks)}; {options.threads} threads")
    steps = options.steps or options.epochs * (len(data.train) // BATCH)
    outcome = run(options.model, data, steps, options.seed, console)
    console.print(as_rich(outcome))
    draw(outcome, options.picture)
    console.print(f"picture: {options.picture}")
    return 0
