"""Times of what no family has yet, one thread, interleaved: DML over PLE, a mix of given vectors, a
step with a fresh route. PYTHONPATH=. python bench/parts.py bench/results/parts.json

Eager is the same mathematics by PyTorch's own operations (`tests/systems.py`, and below).
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fusedmoe.op import fusion_network
from fusedmoe.parts import Expert, Gate, Input, Level, Unit, from_slots
from fusedmoe.route import Choice, Routed
from fusedmoe.speed.machine import describe
from fusedmoe.speed.measuring import pinned, repeats_of, seconds_of, times_of
from fusedmoe.speed.subjects import SUBJECTS, build
from fusedmoe.table import Table
from tests.systems import Sizes, System, dml

ROWS, ROUNDS = 512, 100
# DML's sizes for the census rows: PLE's experts, towers, GK and GW.
PAPER = Sizes(120, (128, 128), (128, 80), 80)


def mix(vectors: int = 8, width: int = 128, units: int = 3) -> System:
    """A softmax and a weighted sum over vectors that are given; each unit's gate reads the first one."""
    experts = tuple(Expert(from_slots(s)) for s in range(vectors))
    gates = tuple(Unit(Gate((from_slots(0),), tuple(range(vectors)))) for _ in range(units))

    def plain(x: Tensor, p: dict[str, Tensor]) -> Tensor:
        of = [f"levels.0.gates.{u}" for u in range(units)]
        w = [torch.softmax(torch.nn.functional.linear(x[:, 0], p[f"{g}.weight"], p[f"{g}.bias"]), -1) for g in of]
        return torch.stack([(one[..., None] * x).sum(1) for one in w], 1)

    return System(Table((Input(vectors, width),), (Level(experts, gates),)), plain)


def tensors_of(table: Table) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    given = table.inputs[0]
    x = torch.randn(ROWS, given.slots, given.width, generator=generator).requires_grad_()
    params = [torch.randn(p.shape, generator=generator) * p.shape[-1] ** -0.5 for p in table.parameters]
    return x, [p.requires_grad_() for p in params]


def medians(arms: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Milliseconds by arm, a few calls of each in turn."""
    repeats = {name: repeats_of(call) for name, call in arms.items()}
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(ROUNDS):
        for name, call in arms.items():
            times[name].append(seconds_of(call, repeats[name]))
    return {name: round(1e3 * times_of(found).median, 4) for name, found in times.items()}


def compared(system: System) -> dict[str, dict[str, float]]:
    """Our time, eager's, and how often ours goes into eager's."""
    x, params = tensors_of(system.table)
    named = dict(zip([p.name for p in system.table.parameters], params, strict=True))
    ours = partial(fusion_network, x, params, system.table, "cpu")
    eager = partial(system.plain, x, named)

    def trained(call: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: call().sum().backward()

    found = {"training": medians({"ours": trained(ours), "eager": trained(eager)})}
    with torch.no_grad():
        found["inference"] = medians({"ours": ours, "eager": eager})
    for times in found.values():
        times["x eager"] = round(times["eager"] / times["ours"], 2)
    return found


def routed() -> dict[str, float]:
    """A training step of AdaTT T3m2 with a route that no call had, and once more with the same one."""
    table = build(SUBJECTS["AdaTT T3m2"]).wiring.table
    x, params = tensors_of(table)
    draw = random.Random(0)

    def choice(unit: Unit) -> Choice | None:
        sees = unit.gate.sees if unit.gate else ()
        return Choice(tuple(draw.sample(sees, draw.randint(1, len(sees))))) if sees else None

    def drawn() -> Routed:
        return Routed(table, tuple(tuple(choice(unit) for unit in level.units) for level in table.levels))

    def seconds(given: Callable[[], Routed]) -> float:
        start = time.perf_counter()
        fusion_network(x, params, given(), "cpu").sum().backward()
        return time.perf_counter() - start

    fresh, known = [], []
    for _ in range(3 * ROUNDS):
        routes: list[Routed] = []
        fresh.append(seconds(lambda kept=routes: kept.append(drawn()) or kept[0]))
        known.append(seconds(lambda kept=routes: kept[0]))
    found = {"fresh": 1e3 * statistics.median(fresh), "known": 1e3 * statistics.median(known)}
    return {**found, "fresh over known": round(statistics.median(a / b for a, b in zip(fresh, known, strict=True)), 3)}


def main(path: str) -> None:
    with pinned(1):
        cells = {
            "DML (CTFM and GKD) over PLE, 2 tasks": compared(dml(2, sizes=PAPER)),
            "DML (CTFM and GKD) over PLE, 3 tasks": compared(dml(3, sizes=PAPER)),
            "DML (CTFM and GKD) over PLE, 3 tasks, a quarter as wide": compared(
                dml(3, sizes=Sizes(120, (32, 32), (32, 20), 20))
            ),
            "mix of 8 given vectors of 128, 3 units": compared(mix()),
            "AdaTT T3m2, training step with a route": routed(),
        }
    found = {"rows": ROWS, "threads": 1, "unit": "ms", "machine": describe(), "cells": cells}
    Path(path).write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(cells, indent=1))


if __name__ == "__main__":
    main(sys.argv[1])
