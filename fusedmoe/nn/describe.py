"""A table in words."""

from __future__ import annotations

from fusedmoe import graph
from fusedmoe.graph import COPY, NORM, NOTHING, Mlp, Stage, Vector, product
from fusedmoe.table import Table


def describe_table(table: Table) -> str:
    """Return a table in words: sizes, then experts and units per level, equal ones on one line."""
    network = table.graph
    count = sum(product(p.shape) for p in table.parameters)
    inputs = [
        f"[B, {given.slots}, {given.width}]" if given.slots > 1 else f"[B, {given.width}]" for given in table.inputs
    ]
    out = table.output
    if network.tasks:
        out = len(network.tasks), sum(network.levels[-1].units[u].width for u in network.tasks[0])
    sizes = f"input {' and '.join(inputs)}, output [B, {out[0]}, {out[1]}]"
    lines = [f"{sizes}; {count:,} parameters, {table.flops:,} FLOPs a row"]
    for number, level in enumerate(network.levels):
        lines.append(f"level {number}: {_count(len(level.experts), 'expert')}, {_count(len(level.units), 'unit')}")
        lines += _grouped("expert", [_mlp(expert.mlp, number) for expert in level.experts])
        lines += _grouped("unit", [_unit(unit, number, network) for unit in level.units])
    tasks = [f"reads {_count_of('unit', units)}" for units in network.tasks]
    for tower in network.towers:
        tasks.append(f"reads {_vectors(tower.sources, len(network.levels), 'unit')}, tower {_stages(tower)}")
    return "\n".join([*lines, *_grouped("task", tasks)])


def _grouped(word: str, texts: list[str]) -> list[str]:
    """One line per run of equal texts."""
    lines = []
    first = 0
    for i in range(1, len(texts) + 1):
        if i == len(texts) or texts[i] != texts[first]:
            lines.append(f"  {_count_of(word, range(first, i))}: {texts[first]}")
            first = i
    return lines


def _vectors(vectors: tuple[Vector, ...], level: int, slot: str = "slot") -> str:
    """What is read, in the words of a level: `slot` is what stands right below it."""
    words: list[tuple[str, int]] = []
    for vector in vectors:
        below = ("unit", level - 1) if level else ("input", 0)
        name = slot if (vector.kind, vector.place) == below else vector.kind
        if name != slot and name != "expert":
            name = f"{name} slot" if name == "input" else f"level {vector.place}, unit"
        columns = "" if vector.first == 0 else f" from column {vector.first}"
        words.append((f"{name}{columns}{' detached' if vector.detached else ''}", vector.index))
    if len({word for word, _ in words}) == 1:
        return _count_of(words[0][0], [index for _, index in words])
    return ", ".join(_count_of(word, [index]) for word, index in words)


def _mlp(mlp: Mlp, level: int) -> str:
    width = sum(source.width for source in mlp.sources)
    return (
        f"{_vectors(mlp.sources, level)}, {width} > {_stages(mlp)}"
        if mlp.stages
        else f"{_vectors(mlp.sources, level)}, {width}"
    )


def _stages(mlp: Mlp) -> str:
    return " > ".join(map(_stage, mlp.stages))


def _stage(stage: Stage) -> str:
    head = {COPY: "", NORM: "LayerNorm"}.get(stage.kind, str(stage.width))
    activation = (
        "PReLU" if stage.slope != NOTHING else "" if stage.activation.name == "identity" else str(stage.activation)
    )
    dropout = f"dropout({stage.dropout:g})" if stage.dropout else ""
    bias = "without bias" if stage.bias == NOTHING and stage.kind != COPY else ""
    return " ".join(filter(None, (head, activation, dropout, bias)))


def _unit(unit: graph.Unit, level: int, network: graph.Graph) -> str:
    if unit.product:
        return f"product of {_count_of('expert', unit.product)}"
    return f"{_gate(unit.gate, level)}, {_static(unit.static)}"


def _gate(gate: graph.Gate | None, level: int) -> str:
    if gate is None:
        return "no gate"
    sees = f"sees {_count_of('expert', gate.sees)}"
    if gate.keys:
        return f"{sees}, attention of {_vectors(gate.query, level)}"
    if not gate.mlps:
        return f"{sees}, free gate"
    *hidden, last = gate.mlps[0].stages
    through = f" through {' > '.join(map(_stage, hidden))}" if hidden else ""
    selectors = " or ".join(_vectors(mlp.sources, level) for mlp in gate.mlps)
    return f"{sees}, gate on {selectors}{through}{'' if last.bias != NOTHING else ' without bias'}"


def _static(static: graph.Static | None) -> str:
    if static is None or not static.experts:
        return "no static weights"
    if static.parameter != NOTHING:
        each = " per channel" if static.channels else ""
        return f"learned static weights{each} on {_count_of('expert', static.experts)}"
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
