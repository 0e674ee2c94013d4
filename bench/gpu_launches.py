"""What each launch of a network computes and moves on a GPU, counted from its plans: no device, no
time.

Forward: the bytes are `roofline.traffic`'s. A program multiplies its BLOCK_B rows with each number
of a weight that it reads, so the FLOPs of products are 2 x BLOCK_B x numbers of weights read:
hidden layers and gates that several column tiles compute again are in it, and so are rows beyond
the batch. Backward: the records of `backward_plan.py`, tile by tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, prod
from types import SimpleNamespace
from typing import NamedTuple

from roofline import traffic

from fusedmoe.kernels import layout
from fusedmoe.kernels.backward_plan import BackwardPlan, backward_plan_of
from fusedmoe.kernels.layout import EXPERT_KIND, FROM_X, MATRIX_KIND
from fusedmoe.kernels.plan import plan_of
from fusedmoe.kernels.program import COLUMN, NOTHING, Linear, Program, X, rounded_up
from fusedmoe.kernels.tiles import CHUNK, Tiles
from fusedmoe.kernels.triton.launch import ADD_BLOCK

# Bytes of float32.
FLOAT = 4


class Launched(NamedTuple):
    """One launch.

    name: of the kernel, and the segments that it runs. programs: in its grid. rows: of a program's
    tile. products: FLOPs of matrix products.
    mixes: FLOPs of weighted sums on the ordinary cores. once: bytes, each tensor that it takes or
    leaves once. moved: bytes, as its programs read and write them.
    """

    name: str
    programs: int
    rows: int
    products: int
    mixes: int
    once: int
    moved: int


@dataclass
class _Sum:
    """Bytes that grow with the rows, and bytes and FLOPs of one row block; `tensors` has what is
    moved at least, each by a key of its own."""

    row: int = 0
    block: int = 0
    # FLOPs of one row.
    products: int = 0
    mixes: int = 0
    tensors: dict[tuple, tuple[int, int]] = field(default_factory=dict)

    def moves(self, row: int = 0, block: int = 0) -> None:
        self.row += row
        self.block += block

    def tensor(self, key: tuple, row: int = 0, block: int = 0) -> None:
        """Bytes a row, or bytes in all, of a tensor; naming it again changes nothing."""
        self.tensors[key] = (row, block)

    def once(self, rows: int) -> int:
        return sum(rows * row + block for row, block in self.tensors.values())


def forward(program: Program, tiles: Tiles, rows: int, size: int) -> list[Launched]:
    """Return the launches of a forward over so many rows of numbers of `size` bytes."""
    matrices = {linear.weight for outer in program.linears for linear in _chain(outer)} - {NOTHING}
    names = {program.table.parameters[number].name for number in matrices}
    blocks = ceil(rows / tiles.rows)
    found = []
    for launch in plan_of(program, tiles.whole, tiles.units, tiles.columns).launches:
        part = only(program, launch.segments)
        # Row blocks are alike but for the last one.
        full, last = traffic(part, tiles, tiles.rows, size), traffic(part, tiles, (rows - 1) % tiles.rows + 1, size)
        weights = blocks * sum(full.read[name] for name in names) // size
        mixed = sum(
            len(unit.reads) * unit.width for segment in launch.segments for unit in program.segments[segment].units
        )
        found.append(
            Launched(
                f"forward, {', '.join(program.segments[segment].name for segment in launch.segments)}",
                blocks * launch.programs,
                tiles.rows,
                2 * tiles.rows * weights,
                2 * tiles.rows * blocks * mixed,
                each_once(program, launch.segments, rows, size),
                (blocks - 1) * full.total + last.total,
            )
        )
    return found


def _chain(linear: Linear | None) -> Iterator[Linear]:
    """A map and those inside of it."""
    while linear:
        yield linear
        linear = linear.hidden


def only(program: Program, segments: Sequence[int]) -> Program:
    """The program with what stands in other segments left out, every segment in its place."""
    return Program(
        program.table,
        tuple(s if n in segments else replace(s, experts=(), units=()) for n, s in enumerate(program.segments)),
    )


def each_once(program: Program, segments: Sequence[int], rows: int, size: int) -> int:
    """Bytes of what the segments need from outside and of what they hand on, each once. All slots
    of x are one tensor, as a trunk expands it."""
    part = only(program, segments)
    linears = [linear for outer in part.linears for linear in _chain(outer)]
    sources = {source for linear in linears for source in linear.sources if source.segment not in segments}
    columns = sum(source.width for source in sources if source.segment != X) + program.table.inputs[0].width * any(
        source.segment == X for source in sources
    )
    columns += sum(unit.width for segment in segments for unit in program.segments[segment].units)
    params = {number for linear in linears for number in (linear.weight, linear.bias)}
    params |= {unit.static for segment in segments for unit in program.segments[segment].units}
    return size * (rows * columns + sum(prod(program.table.parameters[number].shape) for number in params - {NOTHING}))


def backward(program: Program, tiles: Tiles, rows: int, size: int) -> list[Launched]:
    """Return the launches of a backward that returns no gradient of the mixing weights, and is
    given none."""
    plan = plan_of(program, tiles.whole, tiles.units, tiles.columns)
    written = backward_plan_of(plan, tiles.whole, tiles.columns, tiles.outputs)
    blocks, found = ceil(rows / tiles.rows), []
    for launch in written.launches:
        count = _Rows(written, tiles, size)
        ends = written.ints[launch.place : launch.place + 2 * launch.programs]
        for first, end in zip(ends[::2], ends[1::2], strict=True):
            for place in range(first, end, layout.BACKWARD_TILE.size):
                tile = layout.BACKWARD_TILE.unpack(written.ints, place)
                (count.expert if tile.kind == EXPERT_KIND else count.source)(tile.record)
        total, padded = count.sum, blocks * tiles.rows
        name = f"backward_rows, {', '.join(program.segments[segment].name for segment in launch.segments)}"
        moved = rows * total.row + blocks * total.block
        found.append(
            Launched(
                name,
                blocks * launch.programs,
                tiles.rows,
                padded * total.products,
                padded * total.mixes,
                total.once(rows),
                moved,
            )
        )
    total = program.gradients[1]
    if total:
        chunks = ceil(rows / CHUNK)
        found.append(_gradients(written, tiles, rows, size))
        added = total * (FLOAT * chunks + size)
        found.append(Launched("add_chunks", ceil(total / ADD_BLOCK), ADD_BLOCK, 0, total * chunks, added, added))
    return found


class _Rows:
    """Adds up the tiles of one launch of `backward_rows`."""

    def __init__(self, plan: BackwardPlan, tiles: Tiles, size: int):
        self.ints, self.block, self.size = plan.ints, tiles.columns, size
        self.sum = _Sum()

    def named(self, kind: str, place: tuple[int, ...], width: int) -> None:
        """Columns of x, a buffer or the output (`h`), or of their gradients (`d`), by their place."""
        # Slots of x are one tensor, and those of d_x are not.
        self.sum.tensor((kind, FROM_X) if kind == "h" and place[0] == FROM_X else (kind, *place), row=width * self.size)

    def expert(self, record: int) -> None:
        ints, size, add = self.ints, self.size, self.sum
        tile = layout.EXPERT_TILE.unpack(ints, record)
        linear, first_source = layout.LINEAR.unpack(ints, tile.linear), tile.linear + layout.LINEAR.size
        columns = min(self.block, tile.width - tile.column)
        for place in _places(first_source, layout.SOURCE, linear.sources):
            source = layout.SOURCE.unpack(ints, place)
            self.named("h", source.place, source.width)
        if linear.weight == NOTHING:
            add.moves(row=columns * size)
        else:
            biased = linear.bias != NOTHING
            add.moves(row=linear.reduction * size, block=columns * (linear.reduction + biased) * size)
            add.tensor(("weight", linear.weight), block=tile.width * linear.reduction * size)
            add.tensor(("bias", linear.weight), block=tile.width * biased * size)
            add.products += 2 * columns * linear.reduction
        for place in _places(record + layout.EXPERT_TILE.size, layout.READER, tile.readers):
            reader = layout.READER.unpack(ints, place)
            self.named("d", reader.place, tile.width)
            add.moves(row=columns * size + 2 * FLOAT)
            add.tensor(("p", reader.p), row=FLOAT)
            add.tensor(("dw", reader.dw), row=FLOAT)
            elements = layout.UNIT.unpack(ints, reader.unit).elements
            add.moves(block=(ints[elements + reader.read] != NOTHING) * size)
            # g y into dw, w g into dy.
            add.mixes += 4 * columns
        add.moves(row=min(self.block, rounded_up(tile.width, COLUMN) - tile.column) * size)
        add.tensor(("dz", tile.dz), row=rounded_up(tile.width, COLUMN) * size)

    def source(self, record: int) -> None:
        ints, size, add = self.ints, self.size, self.sum
        tile = layout.SOURCE_TILE.unpack(ints, record)
        columns = min(self.block, tile.width - tile.column)
        add.moves(row=(1 + tile.add) * columns * size)
        self.named("d", tile.place, tile.width)
        uses = record + layout.SOURCE_TILE.size
        for place in _places(uses, layout.USE, tile.uses):
            use = layout.USE.unpack(ints, place)
            if use.weight == NOTHING:
                add.moves(row=columns * size)
            else:
                add.moves(row=rounded_up(use.outputs, COLUMN) * size, block=use.outputs * columns * size)
                add.tensor(("weight", use.weight), block=use.outputs * use.reduction * size)
                add.products += 2 * use.outputs * columns
            add.tensor(("dz", use.dz), row=rounded_up(use.outputs, COLUMN) * size)
        for place in _places(uses + layout.USE.size * tile.uses, layout.SELECTION, tile.selections):
            self.selection(layout.SELECTION.unpack(ints, place), columns)

    def selection(self, selection: SimpleNamespace, columns: int) -> None:
        ints, size, add = self.ints, self.size, self.sum
        unit = layout.UNIT.unpack(ints, selection.unit)
        seen = sum(row != NOTHING for row in ints[unit.seen : unit.seen + unit.reads])
        moved = unit.reads * FLOAT * (1 + selection.tiles) + selection.store * seen * size
        add.moves(row=moved, block=seen * columns * size)
        add.products += 2 * seen * columns
        add.tensor(("weight", selection.weight), block=seen * selection.reduction * size)
        add.tensor(("dz", selection.dz), row=seen * size)
        for read in range(unit.reads):
            add.tensor(("p", selection.p + read), row=FLOAT)
            for tile in range(selection.tiles):
                add.tensor(("dw", selection.dw + tile * selection.stride + read), row=FLOAT)


def _places(first: int, record: layout.Record, count: int) -> range:
    """Where records of one kind begin that lie one after another."""
    return range(first, first + record.size * count, record.size)


def _gradients(plan: BackwardPlan, tiles: Tiles, rows: int, size: int) -> Launched:
    """The launch that sums dW, db and dv over chunks of rows, in float32."""
    ints, add, chunks = plan.ints, _Sum(), ceil(rows / CHUNK)
    for task in ints[plan.place : plan.place + plan.tasks]:
        if ints[task + layout.MATRIX_TASK.kind] == MATRIX_KIND:
            matrix = layout.MATRIX_TASK.unpack(ints, task)
            source = layout.SOURCE.unpack(matrix.source, 0)
            tile, columns = (
                min(tiles.outputs, matrix.outputs - matrix.row),
                min(tiles.columns, source.width - matrix.column),
            )
            read = min(tiles.outputs, rounded_up(matrix.outputs, COLUMN) - matrix.row)
            add.moves(row=(read + columns) * size, block=tile * (columns + (matrix.bias != NOTHING)) * FLOAT)
            add.products += 2 * tile * columns
            add.tensor(("dz", matrix.dz), row=rounded_up(matrix.outputs, COLUMN) * size)
            add.tensor(("h", *source.place) if source.place[0] != FROM_X else ("h", FROM_X), row=source.width * size)
        else:
            terms = layout.STATIC_TASK.unpack(ints, task).terms
            for place in _places(task + layout.STATIC_TASK.size, layout.TERM, terms):
                term = layout.TERM.unpack(ints, place)
                add.moves(row=term.tiles * FLOAT)
                for tile in range(term.tiles):
                    add.tensor(("dw", term.dw + tile * term.stride), row=FLOAT)
            add.moves(block=FLOAT)
    add.tensor(("parts",), block=chunks * add.block)
    padded = sum(rounded_up(min(CHUNK, rows - first), tiles.reduction) for first in range(0, rows, CHUNK))
    moved = rows * add.row + chunks * add.block
    return Launched("gradients", plan.tasks * chunks, tiles.outputs, padded * add.products, 0, add.once(rows), moved)
