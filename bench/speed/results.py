"""A case measured, as one record of the JSON file; the ratios that the tables show.

And the file itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from fusedmoe.functional import fusion_network
from fusedmoe.speed.case import Case
from fusedmoe.speed.grids import Cell
from fusedmoe.speed.machine import peak_gflops
from fusedmoe.speed.measuring import ROUNDS, SETTLE, measure, pinned
from fusedmoe.speed.memory import peak_rise, saved_bytes
from fusedmoe.speed.runtimes import Absent
from fusedmoe.speed.subjects import Called, Layer, Sizes

# Before each case, so that the share of the peak is that of the minute in which the case was timed.
CASE_PEAK_SECONDS = 0.1


class Ratio(NamedTuple):
    """How many times faster than an arm ours is, and which arm it was."""

    times: float
    arm: str


def fastest(record: Mapping, models: Iterable[str]) -> str | None:
    """Return the fastest rival of the record's precision among the arms that run these networks.

    None if there is none.
    """
    arms = {
        name: arm
        for name, arm in record["arms"].items()
        if arm["model"] in models and arm["precision"] == record["dtype"]
    }
    return min(arms, key=lambda name: arms[name]["median"]) if arms else None


def ratios(record: Mapping, ours: str = "fused") -> dict[str, Ratio]:
    """Return how one of our arms compares, as far as both sides are there.

    "eager": the layer as it is; "reference": the best of all rivals that run the layer as it is;
    "best": the best of all, those with the restructured network included. Only rivals that compute
    in the record's precision count.
    """
    if ours not in record["arms"]:
        return {}
    mine = record["arms"][ours]["median"]
    chosen = {"eager": "eager" if "eager" in record["arms"] else None}
    chosen |= {"reference": fastest(record, ("reference",)), "best": fastest(record, ("reference", "restructured"))}
    return {name: Ratio(record["arms"][arm]["median"] / mine, arm) for name, arm in chosen.items() if arm}


def share_of_peak(record: Mapping, peak: float | None, ours: str = "fused") -> float | None:
    """Return the share of the float32 multiply-add peak of the record's threads that one of our
    arms reaches; None without either.
    """
    if ours not in record["arms"] or not peak:
        return None
    return record["flops"] / record["arms"][ours]["median"] / (1e9 * peak * record["threads"])


def run(
    case: Case,
    rounds: int = ROUNDS,
    say: Callable[[str], None] = lambda what: None,
    advance: Callable[[], None] = lambda: None,
) -> dict:
    """Check and time a case; return its record.

    Args: say: told what is being done; advance: called after every round.
    """
    cell = case.cell
    say("checking parity")
    case.check()
    say("timing")
    peak = peak_gflops(CASE_PEAK_SECONDS)
    with pinned(cell.threads):
        times = measure(case.arms, rounds, SETTLE if cell.threads > 1 else 0.0, advance)
    arms = {
        name: {**seconds._asdict(), "precision": case.precisions[name], "model": case.models[name]}
        for name, seconds in times.items()
    }
    record = {
        "layer": cell.layer,
        "sizes": cell.sizes._asdict(),
        "mode": cell.mode,
        "batch": cell.batch,
        "dtype": cell.dtype,
        "threads": cell.threads,
    }
    record |= {
        "rounds": rounds,
        "flops": case.flops,
        "bytes": case.bytes,
        "peak_gflops": peak,
        "arms": arms,
        "absent": case.absent,
    }
    return record | ({"memory": memory(case)} if cell.mode != "inference" else {})


class Recomputed(nn.Module):
    """x [B, D] -> the layer's network with `recompute=True`, which keeps the least for backward."""

    def __init__(self, layer: Layer, backend: str) -> None:
        super().__init__()
        self.params, self.table, self.backend = nn.ParameterList(layer.params), layer.table, backend

    def forward(self, x: Tensor) -> Tensor:
        slots = x.unsqueeze(1).expand(-1, self.table.inputs[0].slots, -1)
        return fusion_network(slots, list(self.params), self.table, self.backend, recompute=True)


def memory(case: Case) -> dict[str, dict[str, int | None]]:
    """Return the bytes saved for backward, and the rise of the peak in a training step, of the
    eager and the fused layer, and of the fused one that recomputes.
    """
    setting, found = case.setting, {}
    networks = {"eager": Called(setting.layer.module, setting.layer.slots)}
    with suppress(Absent):
        networks |= {"fused": setting.fused(), "fused, recompute": Recomputed(setting.layer, setting.session.backend)}
    with pinned(case.cell.threads):
        for name, network in networks.items():
            found[name] = {
                "saved_bytes": saved_bytes(network, setting.work.x),
                "peak_bytes": peak_rise(setting.call(network)),
            }
    return found


def cell_of(record: Mapping) -> Cell:
    """Return the cell of a record."""
    sizes = record["sizes"]
    sizes = Sizes(**{**sizes, "experts": tuple(map(tuple, sizes["experts"]))})
    return Cell(record["layer"], sizes, record["mode"], record["batch"], record["dtype"], record["threads"])


def save(path: Path, machine: Mapping, overhead: Mapping, records: Iterable[Mapping]) -> None:
    """Write the results, one case a line, over what was there; all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cases = ",\n".join(json.dumps(record) for record in records)
    head = f'"machine": {json.dumps(machine, indent=1)},\n"overhead": {json.dumps(overhead)}'
    text = f'{{\n{head},\n"cases": [\n{cases}\n]\n}}\n'
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)


def load(path: Path) -> dict:
    """Read saved results."""
    return json.loads(path.read_text())


def finished(path: Path, machine: Mapping) -> list[dict]:
    """Return the cases that a file already has, to go on from.

    Raises: ValueError if it was written on another machine or from another commit or tree.
    """
    if not path.exists():
        return []
    saved = load(path)
    for name in ("cpu", "isa", "versions", "commit"):
        if saved["machine"][name] != machine[name]:
            raise ValueError(
                f"{path}, {name}: expected {machine[name]}, this run's, got {saved['machine'][name]};"
                " without --resume it is written anew"
            )
    return saved["cases"]
