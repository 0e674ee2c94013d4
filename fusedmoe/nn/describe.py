"""A table in words."""

from __future__ import annotations

from fusedmoe.activation import IDENTITY
from fusedmoe.table import Expert, Layer, Selector, Static, Table, Unit, product


def describe_table(table: Table) -> str:
    """Return a table in words: sizes, then experts and units per level, equal ones on one line."""
    count = sum(product(p.shape) for p in table.parameters)
    slots = f"[B, {table.slots}, {table.width}]" if table.slots > 1 else f"[B, {table.width}]"
    out = table.output
    if table.tasks and not table.has_towers:
        out = len(table.tasks), sum(table.widths[-1][u] for u in table.tasks[0].units)
    lines = [f"input {slots}, output [B, {out[0]}, {out[1]}]; {count:,} parameters, {table.flops:,} FLOPs a row"]
    for number, level in enumerate(table.levels):
        lines.append(f"level {number}: {_count(len(level.experts), 'expert')}, {_count(len(level.units), 'unit')}")
        widths = table.widths[number]
        lines += _grouped("expert", [_expert(expert, widths[expert.slot]) for expert in level.experts])
        lines += _grouped("unit", [_unit(unit) for unit in level.units])
    towers = [_layers(task.tower, ", tower ") for task in table.tasks]
    reads = [f"reads {_count_of('unit', task.units)}" for task in table.tasks]
    lines += _grouped("task", [read + tower for read, tower in zip(reads, towers, strict=True)])
    return "\n".join(lines)


def _grouped(word: str, texts: list[str]) -> list[str]:
    """One line per run of equal texts."""
    lines = []
    first = 0
    for i in range(1, len(texts) + 1):
        if i == len(texts) or texts[i] != texts[first]:
            lines.append(f"  {_count_of(word, range(first, i))}: {texts[first]}")
            first = i
    return lines


def _expert(expert: Expert, width: int) -> str:
    return f"slot {expert.slot}, {width}{_layers(expert.layers, ' > ')}"


def _layers(layers: tuple[Layer, ...], before: str) -> str:
    return before + " > ".join(map(_layer, layers)) if layers else ""


def _layer(layer: Layer) -> str:
    activation = "" if layer.activation == IDENTITY else f" {layer.activation}"
    return f"{layer.width}{activation}{_without_bias(layer.bias)}"


def _without_bias(bias: bool) -> str:
    return "" if bias else " without bias"


def _unit(unit: Unit) -> str:
    if unit.gate is None:
        gate = "no gate"
    else:
        hidden = _layers(unit.gate.hidden, " through ")
        selector = _selector(unit.gate.selector)
        gate = f"sees {_count_of('expert', unit.gate.sees)}, gate on {selector}{hidden}{_without_bias(unit.gate.bias)}"
    return f"{gate}, {_static(unit.static)}"


def _selector(selector: Selector) -> str:
    return "the root input" if selector.kind == "root" else f"{selector.kind} {selector.index}"


def _static(static: Static | None) -> str:
    if static is None or not static.experts:
        return "no static weights"
    if static.values is None:
        return f"learned static weights on {_count_of('expert', static.experts)}"
    return f"static weights {', '.join(f'{v:g}' for v in static.values)} on {_count_of('expert', static.experts)}"


def _count(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def _count_of(word: str, indices) -> str:
    """`expert 3`, `experts 0-3`, `experts 0, 1, 6-8`: runs of neighbours in the order given."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"{word}{'s' if sum(map(len, runs)) != 1 else ''} {text or 'none'}"
