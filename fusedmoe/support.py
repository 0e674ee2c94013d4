"""What of a table each backend can run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from fusedmoe.graph import COPY, LINEAR, NORM, NOTHING, Gate, Graph, Mlp, Unit, Vector

COLUMNS = "sources of some columns of a vector"
DETACHED = "detached sources"
JOINED_COPIES = "copies of several sources"
JOINED_SELECTORS = "gates on several sources"
LAYER_NORM = "LayerNorm"
PRELU = "PReLU"
DROPOUT = "Dropout"
BARE_OPS = "ops without a linear map before them"
SHARED_PARAMETERS = "linear maps that share parameters"
TEMPERATURE = "gates with a temperature"
FREE_GATES = "gates without a selector"
ATTENTION = "attention"
CHANNELS = "static weights per channel"
PRODUCTS = "products of experts"
ROUTES = "a route of the call"

GPU_LACK = {
    *(DROPOUT, ROUTES),
    *(LAYER_NORM, PRELU, BARE_OPS, FREE_GATES, ATTENTION, CHANNELS, PRODUCTS),
    *(JOINED_COPIES, COLUMNS, DETACHED, JOINED_SELECTORS, SHARED_PARAMETERS, TEMPERATURE),
}
LACK: dict[str, set[str]] = {"cpu": set(), "triton": GPU_LACK, "cuda": GPU_LACK, "reference": set()}


def lacking(graph: Graph, backend: str) -> str | None:
    """The first part of a graph that a backend has no kernels for, and where it is; None: it can run it."""
    for feature, where in _features(graph):
        if feature in LACK[backend]:
            return f"{feature} ({where})"
    return None


def _features(graph: Graph) -> Iterator[tuple[str, str]]:
    uses = Counter(stage.weight for mlp in graph.mlps for stage in mlp.stages if stage.kind == LINEAR)
    uses.update(stage.bias for mlp in graph.mlps for stage in mlp.stages if stage.bias != NOTHING)
    for number, level in enumerate(graph.levels):
        for e, expert in enumerate(level.experts):
            yield from _of_mlp(expert.mlp, f"level {number}, expert {e}", uses)
        for u, unit in enumerate(level.units):
            yield from _of_unit(unit, f"level {number}, unit {u}", uses)
    for t, tower in enumerate(graph.towers):
        yield from _of_mlp(tower, f"task {t}, tower", uses)


def _of_unit(unit: Unit, where: str, uses: Counter[int]) -> Iterator[tuple[str, str]]:
    if unit.product:
        yield PRODUCTS, where
    if unit.static and unit.static.channels:
        yield CHANNELS, where
    if unit.gate:
        yield from _of_gate(unit.gate, where, uses)


def _of_gate(gate: Gate, where: str, uses: Counter[int]) -> Iterator[tuple[str, str]]:
    if gate.keys:
        yield ATTENTION, where
    elif not gate.mlps:
        yield FREE_GATES, where
    elif gate.factor != 1.0:
        yield TEMPERATURE, where
    if gate.mlp:
        if len(gate.mlp.sources) > 1:
            yield JOINED_SELECTORS, where
        yield from _of_mlp(gate.mlp, where, uses)
    for vectors in (gate.query, *gate.keys):
        yield from _of_vectors(vectors, where)


def _of_mlp(mlp: Mlp, where: str, uses: Counter[int]) -> Iterator[tuple[str, str]]:
    yield from _of_vectors(mlp.sources, where)
    if len(mlp.sources) > 1 and not mlp.stages:
        yield JOINED_COPIES, where
    for stage in mlp.stages:
        if stage.kind == NORM:
            yield LAYER_NORM, where
        if stage.slope != NOTHING:
            yield PRELU, where
        if stage.dropout:
            yield DROPOUT, where
        if stage.kind == COPY:
            yield BARE_OPS, where
        if stage.kind == LINEAR and max(uses[stage.weight], uses[stage.bias]) > 1:
            yield SHARED_PARAMETERS, where


def _of_vectors(vectors: tuple[Vector, ...], where: str) -> Iterator[tuple[str, str]]:
    for vector in vectors:
        if not vector.whole:
            yield COLUMNS, where
        if vector.detached:
            yield DETACHED, where
