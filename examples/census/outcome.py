"""What the demonstration found, and the table it ends with."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table as RichTable
from torch import Tensor

from fusedmoe.demo.dataset import Dataset
from fusedmoe.demo.metrics import auc, explained_variance
from fusedmoe.demo.training import BATCH, Arm, Difference, predict
from fusedmoe.table import Table


@dataclass(frozen=True)
class Outcome:
    """Both arms after training, their differences at equal weights, and the mean mixing weights of
    each level [U, E].
    """

    family: str
    data: Dataset
    plain: Arm
    fused: Arm
    outputs: Difference
    gradients: Difference
    table: Table
    mixing: list[Tensor]


def scores(arm: Arm, data: Dataset) -> list[float]:
    """Return the AUC (binary targets) or R^2 of each task on the test part."""
    measure = auc if data.binary else explained_variance
    predictions, targets = predict(arm.model, data.test).numpy(), data.test.targets.numpy()
    return [measure(predictions[:, t], targets[:, t]) for t in range(targets.shape[1])]


def as_rich(outcome: Outcome) -> RichTable:
    """Lay the outcome out as the table that ends the demonstration."""
    plain, fused, data = outcome.plain, outcome.fused, outcome.data
    table = RichTable(
        title=f"{outcome.family} on {data.name}, batches of {min(BATCH, len(data.train)):,} rows", title_justify="left"
    )
    table.add_column()
    for heading in (plain.name, fused.name, "ratio or difference"):
        table.add_column(heading, justify="right")
    for what, slow, fast in (
        ("training step", plain.step_ms, fused.step_ms),
        ("inference batch", plain.inference_ms, fused.inference_ms),
    ):
        table.add_row(what, f"{slow:.2f} ms", f"{fast:.2f} ms", f"[bold]{slow / fast:.2f} x[/bold]")
    table.add_section()
    for what, difference in (
        ("outputs, same weights", outcome.outputs),
        ("gradients, same weights", outcome.gradients),
    ):
        table.add_row(what, f"up to {difference.scale:.3g}", "", f"{difference.absolute:.1e}")
    table.add_section()
    measure = "AUC" if data.binary else "R²"
    for task, of_plain, of_fused in zip(data.tasks, scores(plain, data), scores(fused, data), strict=True):
        table.add_row(f"test {measure}, {task}", f"{of_plain:.4f}", f"{of_fused:.4f}", f"{of_fused - of_plain:+.4f}")
    return table
