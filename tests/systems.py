"""The systems that are no family yet, as tables, and by their papers' equations in plain PyTorch.

Each equation below is written from the paper, and shares nothing with the operator but the names of
the parameters. x is [B, S, D]; `p` are the parameters by name.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedmoe.activation import Activation
from fusedmoe.drafts import draft_of
from fusedmoe.families import ple
from fusedmoe.parts import (
    Attention,
    Bias,
    Expert,
    Gate,
    Input,
    Level,
    Linear,
    Source,
    Static,
    Task,
    Unit,
    from_slots,
    mlp,
)
from fusedmoe.table import Table

TANH, SIGMOID = Activation("tanh"), Activation("sigmoid")
Parameters = dict[str, Tensor]


class System(NamedTuple):
    """A table, and what it computes: a function of x and the parameters by name."""

    table: Table
    plain: Callable[[Tensor, Parameters], Tensor]


def passed(expert: int) -> Unit:
    """The unit that is one expert."""
    return Unit(static=Static((expert,), (1.0,)))


def linear(p: Parameters, where: str, h: Tensor) -> Tensor:
    return F.linear(h, p[f"{where}.weight"], p.get(f"{where}.bias"))


def detached(sources: tuple[Source, ...], stop: bool) -> tuple[Source, ...]:
    return tuple(Source(s.kind, s.index, s.place, detached=stop) for s in sources)


class Sizes(NamedTuple):
    """Of DML: the input, the experts of PLE's two levels, the towers' layers, and GK and GW."""

    input: int = 7
    experts: tuple[int, int] = (8, 6)
    towers: tuple[int, ...] = (5,)
    knowledge: int = 4


SMALL = Sizes()


def dml(tasks: int, ctfm: bool = True, gkd: bool = True, stop: bool = True, sizes: Sizes = SMALL) -> System:
    """DML over PLE: cross-task feature mining (CTFM) and global knowledge distillation (GKD).

    stop: with stop-gradients; without them it is the paper's DML_v0.
    """
    draft = draft_of(ple)(sizes.input, [[size] for size in sizes.experts], tasks, 2, 1, TANH)
    every, levels = range(tasks), list(draft.levels)
    if ctfm:
        levels += ctfm_levels(tasks, sizes.experts[-1], stop)
    top = len(levels)
    towers = tuple(Expert(from_slots(t), mlp(sizes.towers, TANH)) for t in every)
    levels.append(Level(towers, tuple(map(passed, every))))
    reads = own = tuple((Source("unit", t, top),) for t in every)
    if gkd:
        levels += gkd_levels(own, sizes.knowledge, stop)
        reads = tuple(from_slots(t) + own[t] for t in every)
    shared = ((sizes.experts[-1],) * 2,) * 3 if ctfm else ()
    table = Table(draft.inputs, tuple(levels), tuple(Task(read, (Linear(1),)) for read in reads), shared)

    def plain(x: Tensor, p: Parameters) -> Tensor:
        return dml_of(x, p, tasks, ctfm, gkd, Tensor.detach if stop else lambda h: h, len(sizes.towers))

    return System(table, plain)


def ctfm_levels(tasks: int, width: int, stop: bool) -> list[Level]:
    """O = l + emb; and O plus an attention over all tasks' O, whose keys and values are detached."""
    every = range(tasks)
    query, key, value = (Linear(width, False, shared=i) for i in range(3))
    embedded = Level(tuple(Expert(from_slots(t), (Bias(),)) for t in every), tuple(map(passed, every)))
    experts = [
        *(Expert(from_slots(t), (query,)) for t in every),
        *(Expert(detached(from_slots(t), stop), (key,)) for t in every),
        *(Expert(detached(from_slots(t), stop), (value,)) for t in every),
        *(Expert(from_slots(t)) for t in every),
    ]
    keys = tuple((Source("expert", tasks + t),) for t in every)
    sees = tuple(2 * tasks + t for t in every)
    attention = [Attention((Source("expert", t),), keys, sees, width**-0.5) for t in every]
    units = (Unit(attention[t], Static((3 * tasks + t,), (1.0,))) for t in every)
    return [embedded, Level(tuple(experts), tuple(units))]


def gkd_levels(own: tuple[tuple[Source, ...], ...], width: int, stop: bool) -> list[Level]:
    """GK of all tasks' h, which are detached; and GW * GK, GW of GK and the task's own h."""
    every = range(len(own))
    read = detached(from_slots(*every), stop)
    known = Level(tuple(Expert(read, mlp((width,), TANH)) for _ in every), tuple(map(passed, every)))
    weights = (Expert(from_slots(t) + own[t], (Linear(width), SIGMOID)) for t in every)
    copies = (Expert(from_slots(t)) for t in every)
    return [known, Level((*weights, *copies), tuple(Unit(product=(t, len(own) + t)) for t in every))]


def dml_of(
    x: Tensor, p: Parameters, tasks: int, ctfm: bool, gkd: bool, cut: Callable[[Tensor], Tensor], layers: int
) -> Tensor:
    """DML by its equations; `cut` stops gradients or does not, `layers` are those of a tower."""
    every, h, level = range(tasks), ple_of(x, p, tasks, 2), 2
    if ctfm:
        h = h + torch.stack([p[f"levels.2.experts.{t}.0.bias"] for t in every])  # O = l + emb
        q, k, v = h @ p["shared.0"].T, cut(h) @ p["shared.1"].T, cut(h) @ p["shared.2"].T
        h, level = h + torch.softmax(q @ k.transpose(1, 2) * h.shape[-1] ** -0.5, -1) @ v, 4
    h = torch.stack([tower_of(p, f"levels.{level}.experts.{t}", layers, h[:, t]) for t in every], 1)
    outs = []
    for t in every:
        tail = h[:, t]
        if gkd:
            known = torch.tanh(linear(p, f"levels.{level + 1}.experts.{t}.0", cut(h).flatten(1)))
            weight = torch.sigmoid(linear(p, f"levels.{level + 2}.experts.{t}.0", torch.cat([known, tail], -1)))
            tail = torch.cat([weight * known, tail], -1)
        outs.append(linear(p, f"towers.{t}.0", tail))
    return torch.stack(outs, 1)


def tower_of(p: Parameters, where: str, layers: int, h: Tensor) -> Tensor:
    for j in range(layers):
        h = torch.tanh(linear(p, f"{where}.{j}", h))
    return h


def ple_of(x: Tensor, p: Parameters, tasks: int, levels: int) -> Tensor:
    """PLE with two experts a task and a shared one, equations 2 to 7: the slots of the last level."""
    slots = list(x.unbind(1))
    for level in range(levels):
        owner = [e // 2 for e in range(2 * tasks)] + [tasks]
        y = [torch.tanh(linear(p, f"levels.{level}.experts.{e}.0", slots[o])) for e, o in enumerate(owner)]
        units = []
        for u in range(tasks + (level + 1 < levels)):
            sees = range(2 * tasks + 1) if u == tasks else (2 * u, 2 * u + 1, 2 * tasks)
            w = torch.softmax(linear(p, f"levels.{level}.gates.{u}", slots[u]), -1)
            units.append(sum(w[:, i : i + 1] * y[e] for i, e in enumerate(sees)))
        slots = units
    return torch.stack(slots, 1)


def sluice(tasks: int, subspaces: int, levels: int) -> System:
    """Sluice networks: every layer has subspaces, whose outputs a learned matrix mixes; learned skip
    weights over the levels stand before the towers."""
    width = 4
    count = tasks * subspaces
    built, every = [], range(tasks)
    for number in range(levels):
        experts = []
        for t in every:
            read = from_slots(*range(t * subspaces, (t + 1) * subspaces)) if number else from_slots(t)
            experts += [Expert(read, mlp((width,), TANH))] * subspaces
        seen = tuple(range(count))
        built.append(
            Level(tuple(experts), tuple(Unit(static=Static(seen, tensor=number, offset=u * count)) for u in seen))
        )
    whole = [
        tuple(Source("unit", t * subspaces + g, number) for g in range(subspaces))
        for t in every
        for number in range(levels)
    ]
    units = [
        Unit(static=Static(tuple(range(t * levels, (t + 1) * levels)), tensor=levels, offset=t * levels)) for t in every
    ]
    built.append(Level(tuple(map(Expert, whole)), tuple(units)))
    towers = tuple(Task(from_slots(t), (Linear(1),)) for t in every)
    table = Table((Input(tasks, 5),), tuple(built), towers, ((count, count),) * levels + ((tasks, levels),))

    def plain(x: Tensor, p: Parameters) -> Tensor:
        h, layers = list(x.unbind(1)), []
        for number in range(levels):
            y = torch.stack(
                [torch.tanh(linear(p, f"levels.{number}.experts.{e}.0", h[e // subspaces])) for e in range(count)], 1
            )
            mixed = torch.einsum("ue,beh->buh", p[f"shared.{number}"], y)
            h = [mixed[:, t * subspaces : (t + 1) * subspaces].flatten(1) for t in every]
            layers.append(torch.stack(h, 1))
        skipped = torch.einsum("tl,lbth->bth", p[f"shared.{levels}"], torch.stack(layers))
        return torch.stack([linear(p, f"towers.{t}.0", skipped[:, t]) for t in every], 1)

    return System(table, plain)


def snr(tasks: int, transform: bool) -> System:
    """Sub-network routing: the input of the next sub-networks is a sum over coding variables z times
    outputs (Aver), or times a linear transform of them (Trans)."""
    width, count = 4, 3
    ops = mlp((width,), TANH)
    nets = tuple(Expert(from_slots(0), ops) for _ in range(count))
    edges = [(i, j) for j in range(tasks) for i in range(count)]
    maps = tuple(Expert((Source("expert", i),), (Linear(width, False),)) for i, _ in edges) if transform else ()
    units = []
    for j in range(tasks):
        seen = tuple(count + e for e, edge in enumerate(edges) if edge[1] == j) if transform else tuple(range(count))
        units.append(Unit(static=Static(seen, tensor=0, offset=j * count)))
    towers = tuple(Task(from_slots(t), (Linear(1),)) for t in range(tasks))
    table = Table((Input(1, 5),), (Level((*nets, *maps), tuple(units)),), towers, ((tasks, count),))

    def plain(x: Tensor, p: Parameters) -> Tensor:
        y = [torch.tanh(linear(p, f"levels.0.experts.{i}.0", x[:, 0])) for i in range(count)]
        outs = []
        for j in range(tasks):
            parts = [
                linear(p, f"levels.0.experts.{count + j * count + i}.0", y[i]) if transform else y[i]
                for i in range(count)
            ]
            h = sum(p["shared.0"][j, i] * part for i, part in enumerate(parts))
            outs.append(linear(p, f"towers.{j}.0", h))
        return torch.stack(outs, 1)

    return System(table, plain)


def mssm(tasks: int, cells: int = 3, levels: int = 2) -> System:
    """MSSM's cell level: coding variables z choose the cells through which a task goes; a cell has the
    same parameters for all tasks. Written from the abstract: h[t] = sum over c of z[t,c] cell_c(h[t])."""
    sizes, built, shared = (5, *[4] * levels), [], []
    for number in range(levels):
        first = len(shared)
        shared += [(sizes[number + 1], sizes[number])] * cells + [(sizes[number + 1],)] * cells + [(tasks, cells)]
        ops = [(Linear(sizes[number + 1], True, first + c, first + cells + c), TANH) for c in range(cells)]
        experts = tuple(Expert(from_slots(t if number else 0), one) for t in range(tasks) for one in ops)
        of = [tuple(range(t * cells, (t + 1) * cells)) for t in range(tasks)]
        units = (Unit(static=Static(e, tensor=first + 2 * cells, offset=t * cells)) for t, e in enumerate(of))
        built.append(Level(experts, tuple(units)))
    towers = tuple(Task(from_slots(t), (Linear(1),)) for t in range(tasks))
    table = Table((Input(1, sizes[0]),), tuple(built), towers, tuple(shared))

    def plain(x: Tensor, p: Parameters) -> Tensor:
        h = x.expand(-1, tasks, -1)
        for number in range(levels):
            w, b, (z,) = (
                [p[f"shared.{number * (2 * cells + 1) + first + c}"] for c in range(count)]
                for first, count in ((0, cells), (cells, cells), (2 * cells, 1))
            )
            y = torch.stack([torch.tanh(F.linear(h, w[c], b[c])) for c in range(cells)], 2)
            h = (z[..., None] * y).sum(2)
        return torch.stack([linear(p, f"towers.{t}.0", h[:, t]) for t in range(tasks)], 1)

    return System(table, plain)


# Of each unit of a derived MTNAS: the sub-networks whose values it mixes, and the one that is its query.
ROUTES = [[((0, 2), 1), ((1,), 0), ((0, 1, 2), 2)], [((1, 2), 0), ((0,), 0)]]


def mtnas() -> System:
    """MTNAS, derived: each unit mixes a searched subset by a gate on a searched sub-network's output."""
    ops = mlp((4,), TANH)
    levels = []
    for number, routes in enumerate(ROUTES):
        experts = tuple(Expert(from_slots(h if number else 0), ops) for h in range(3))
        levels.append(Level(experts, tuple(Unit(Gate(((Source("expert", q),),), sees)) for sees, q in routes)))
    table = Table((Input(1, 5),), tuple(levels))

    def plain(x: Tensor, p: Parameters) -> Tensor:
        h = [x[:, 0]] * 3
        for number, routes in enumerate(ROUTES):
            y = [torch.tanh(linear(p, f"levels.{number}.experts.{e}.0", h[e])) for e in range(3)]
            h = []
            for u, (sees, query) in enumerate(routes):
                w = torch.softmax(linear(p, f"levels.{number}.gates.{u}", y[query]), -1)
                h.append(sum(w[:, i : i + 1] * y[e] for i, e in enumerate(sees)))
        return torch.stack(h, 1)

    return System(table, plain)


SYSTEMS: dict[str, System] = {
    "DML": dml(3),
    "DML without stop-gradient": dml(2, stop=False),
    "CTFM alone": dml(3, gkd=False),
    "GKD alone": dml(2, ctfm=False),
    "Sluice": sluice(2, 2, 2),
    "SNR-Aver": snr(2, transform=False),
    "SNR-Trans": snr(3, transform=True),
    "MSSM's cell level": mssm(2),
    "MTNAS, derived": mtnas(),
}
