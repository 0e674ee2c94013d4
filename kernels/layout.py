"""The records of a plan: which integer of a record means what.

A plan is one array of 32-bit integers (`plan.py` writes that of a forward, `backward_plan.py` that
of a backward). A record is some integers of it, one after another, and is named by the place of its
first one. Here each kind has its fields, once: Python writes them by name, Triton's kernels take
their offsets as constants (`triton/records.py`), and the CUDA kernels from csrc/cuda/layout.h, which
this module writes: `python -m fusedmoe.kernels.layout csrc/cuda/layout.h`.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

# Kinds of a source: a slot of x, a buffer that a segment has written, the output.
FROM_X, FROM_BUFFER, TO_OUTPUT = range(3)
# What a tile of the forward does about the softmax: nothing, compute it, compute it and write the
# mixing weights.
NO_SOFTMAX, WRITE_SOFTMAX, WRITE_WEIGHTS = range(3)
# Kinds of a tile of the backward, and of a task of the parameters' gradients.
EXPERT_KIND, SOURCE_KIND = range(2)
MATRIX_KIND, STATIC_KIND = range(2)
# Kinds of a row-wise operation, the last one of the backward alone; and what a mix takes its logits
# from: nothing, a vector, a parameter, the products of a query with keys.
GATHER_KIND, STAGE_KIND, MIX_KIND, PRODUCT_KIND, ZERO_KIND = range(5)
NO_LOGITS, VECTOR_LOGITS, FREE_LOGITS, KEY_LOGITS = range(4)


class Record:
    """The fields of one kind of record. `UNIT.gate` is the offset of a field, `UNIT.size` how many
    integers all are.

    Args:
        name: of the kind, in lower case.
        tail: what follows the record, whose length only a call knows; empty for nothing.
        fields: a field's meaning by its name; a `Record` for one that stands inside.
    """

    def __init__(self, name: str, tail: str = "", /, **fields: str | Record):
        self.name, self.tail, self.fields, self.size = name, tail, fields, 0
        for field, meaning in fields.items():
            setattr(self, field, self.size)
            self.size += meaning.size if isinstance(meaning, Record) else 1

    def pack(self, **values: int | Sequence[int]) -> list[int]:
        """Return the record's integers.

        Raises: TypeError unless every field is given, and nothing else.
        """
        if values.keys() != self.fields.keys():
            raise TypeError(f"record {self.name}: expected {', '.join(self.fields)}, got {', '.join(values)}")
        numbers: list[int] = []
        for field, meaning in self.fields.items():
            value = values[field]
            inside = list(value) if isinstance(value, Sequence) else [value]
            if len(inside) != (meaning.size if isinstance(meaning, Record) else 1):
                raise TypeError(f"record {self.name}: expected {meaning} as {field}, got {value}")
            numbers += inside
        return numbers

    def unpack(self, ints: Sequence[int], place: int) -> SimpleNamespace:
        """Return the fields of the record that begins at a place; one that stands inside as a tuple
        of its integers."""
        found = SimpleNamespace()
        for field, meaning in self.fields.items():
            first = place + getattr(self, field)
            inside = isinstance(meaning, Record)
            setattr(found, field, tuple(ints[first : first + meaning.size]) if inside else ints[first])
        return found

    def __repr__(self) -> str:
        # With every offset: Triton compiles a kernel anew where the text of a constant that it
        # reads has changed.
        return f"{self.name}({', '.join(f'{field}={getattr(self, field)}' for field in self.fields)})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Record) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))


# Numbers of x's, a buffer's and the output's elements; rows of the softmax scratch, and of dw; -1
# for what is not there.
PLACE = Record(
    "place",
    kind="FROM_X, FROM_BUFFER or TO_OUTPUT",
    column="the first column, or x's slot",
    stride="elements from row to row of a buffer or of the output",
    buffer="elements a row that the buffers before this one have",
)
SOURCE = Record("source", place=PLACE, width="columns", first="the first column of W that multiplies it")
LINEAR = Record(
    "linear",
    "its sources",
    weight="number of the parameter W; -1: a copy of its source",
    bias="number of the parameter b, or -1",
    width="outputs",
    reduction="columns of W",
    activation="its code",
    parameter="of the activation: its place among the floats",
    hidden="the linear whose outputs this one reads without a buffer between them, or -1",
    sources="how many",
)
UNIT = Record(
    "unit",
    gate="the linear that gives its logits, or -1",
    reads="how many experts it mixes",
    seen="place of one integer a read: the row of the gate's W, or -1 for an expert that the gate does not see",
    statics="number of the parameter of its learned static weights, or -1",
    elements="place of one integer a read: the element of that parameter, or -1",
    fixed="place among the floats of one fixed static weight a read",
    place=PLACE,
    mixing="place of one integer a read: the column of the mixing weights; -1: nobody asks for them",
)
GROUP = Record(
    "group",
    "UNITS units, UNITS first rows of their softmax (-1 beyond the last one); runs of experts; copies, like experts",
    units="how many",
    width="of each",
    runs="runs of experts",
    copies="experts that are copies",
    selectors="place of the number of selectors, and the runs of gates behind it",
)
RUN = Record(
    "run", "those that read the source", source=SOURCE, count="experts (`expert_read`), or gates (`gate_read`)"
)
# Of a run of experts, and of a run of gates. An expert's is followed by its place among the reads
# of each of UNITS units, or -1.
EXPERT_READ = Record("expert_read", "UNITS places among the units' reads", linear="the expert")
GATE_READ = Record("gate_read", unit="whose gate it is", row="first row of its softmax, counted from the tile's")
TILE = Record(
    "tile",
    group="its group",
    column="first column of its units",
    softmax="first row of its softmax",
    task="NO_SOFTMAX, WRITE_SOFTMAX or WRITE_WEIGHTS",
    wait="whether to wait for what the tiles before wrote",
)
BACKWARD_TILE = Record(
    "backward_tile",
    kind="EXPERT_KIND or SOURCE_KIND",
    record="an expert_tile or a source_tile",
    wait="whether to wait for what the tiles before wrote",
)
EXPERT_TILE = Record(
    "expert_tile",
    "its readers",
    linear="the expert",
    column="first column of the tile",
    width="columns of the expert",
    dz="first column of its dz",
    readers="how many units read it",
)
READER = Record(
    "reader",
    place=PLACE,
    p="row of its softmax",
    dw="row of dw",
    unit="the unit",
    read="place of the expert among its reads",
)
SOURCE_TILE = Record(
    "source_tile",
    "its uses, its selections",
    place=PLACE,
    column="first column of the tile",
    width="columns of the source",
    add="whether to add to what is there",
    uses="how many linears read it",
    selections="how many gates read it",
)
USE = Record(
    "use",
    weight="number of the parameter W; -1: a copy",
    outputs="rows of W",
    reduction="columns of W",
    first="the first column of W that multiplies the source",
    dz="first column of its dz",
)
SELECTION = Record(
    "selection",
    unit="whose gate it is",
    weight="number of the gate's W",
    reduction="columns of W",
    dz="first column of its dz",
    p="first row of the softmax",
    dw="first row of dw",
    tiles="parts of dw",
    stride="rows of dw from part to part",
    store="whether this tile is to store dz",
)
MATRIX_TASK = Record(
    "matrix_task",
    "where linear maps share parameters, further_uses",
    kind="MATRIX_KIND",
    weight="where dW begins among the gradients",
    bias="where db begins; -1: not of this task",
    outputs="rows of W",
    reduction="columns of W",
    dz="first column of dz",
    row="first row of the tile of dW",
    column="first column of the tile, counted from the source's",
    source=SOURCE,
)
FURTHER_USES = Record("further_uses", "each of them (`matrix_use`)", uses="how many more linears have this W")
MATRIX_USE = Record("matrix_use", dz="first column of dz", source=SOURCE)
STATIC_TASK = Record(
    "static_task", "its terms", kind="STATIC_KIND", element="its place among the gradients", terms="how many"
)
TERM = Record(
    "term",
    dw="first row of dw",
    tiles="parts of dw",
    stride="rows of dw from part to part",
    mixing="column of its mixing weight, or -1",
)
# Row-wise operations, both directions. Places of a backward's gradients are those of the values; all
# are zero before the operations add to them (ZERO_KIND). A parameter's gradient goes row by row to
# dw, one row of it an element of the parameter, and -1 says that there is none to write: always in a
# forward.
OPERATION = Record("operation", kind="GATHER_KIND, STAGE_KIND, ...", record="a gather, stage, mix, product or zero")
GATHER = Record("gather", "its parts, side by side in the result", place=PLACE, parts="how many")
# Parts may be of one vector: a backward adds one after another.
PART = Record(
    "part",
    place=PLACE,
    first="the first column that is read of the vector",
    width="columns",
    column="where they go in the result",
    sends="whether their gradient goes back",
)
STAGE = Record(
    "stage",
    source=PLACE,
    place=PLACE,
    width="columns of both",
    norm="whether the head is a LayerNorm; else a copy",
    eps="of the LayerNorm: its place among the floats",
    weight="number of the parameter gamma, or -1",
    bias="number of the parameter beta or b, or -1",
    activation="its code",
    parameter="of the activation: its place among the floats",
    slope="number of PReLU's parameter, which then takes the activation's place; or -1",
    slopes="1 where there is a slope a column, 0 where one serves all",
    stream="number of the dropout, or -1 for none",
    threshold="what a random word is compared with, 32 bits without a sign: below it the element is dropped",
    scale="what is kept is multiplied by: its place among the floats",
    d_weight="first row of dw of gamma's gradient, or -1",
    d_bias="of b's or beta's",
    d_slope="of the slopes': one row where one serves all",
)
# The softmax of what the unit's gate sees stands in rows of p, one a read, as that of other units.
MIX = Record(
    "mix",
    "its reads (`mix_read`)",
    unit="the unit: a record without a gate, whose `seen` are columns of the logits",
    width="columns of the unit",
    logits="NO_LOGITS, VECTOR_LOGITS, FREE_LOGITS or KEY_LOGITS",
    source=PLACE,
    columns="of the source: the vector of logits, or the query",
    free="number of the parameter that is the logits, or -1",
    factor="what logits are multiplied by: its place among the floats",
    channels="number of the parameter of static weights a column, or -1 (the unit then has no others that are learned)",
    p="first row of its softmax",
    given="whether the unit has a gradient; else only its mixing weights have",
    dw="first row of dw of its learned static weights' gradients, one a read, or -1",
    d_free="first row of dw of the free logits' gradients, one a read (0 for what is not seen), or -1",
)
MIX_READ = Record(
    "mix_read",
    place=PLACE,
    key=PLACE,
    element="first of the expert's static weights a column among `channels`, or -1",
    d_channels="first row of dw of their gradients, or -1",
)
PRODUCT = Record("product", place=PLACE, width="columns", a=PLACE, b=PLACE)
ZERO = Record("zero", place=PLACE, width="columns")
RECORDS = (
    *(PLACE, SOURCE, LINEAR, UNIT, GROUP, RUN, EXPERT_READ, GATE_READ, TILE),
    *(BACKWARD_TILE, EXPERT_TILE, READER, SOURCE_TILE, USE, SELECTION),
    *(MATRIX_TASK, FURTHER_USES, MATRIX_USE, STATIC_TASK, TERM),
    *(OPERATION, GATHER, PART, STAGE, MIX, MIX_READ, PRODUCT, ZERO),
)
CONSTANTS = (
    *("FROM_X", "FROM_BUFFER", "TO_OUTPUT", "WRITE_SOFTMAX", "WRITE_WEIGHTS", "EXPERT_KIND", "MATRIX_KIND"),
    *("GATHER_KIND", "STAGE_KIND", "MIX_KIND", "PRODUCT_KIND", "ZERO_KIND"),
    *("NO_LOGITS", "VECTOR_LOGITS", "FREE_LOGITS", "KEY_LOGITS"),
)


def header() -> str:
    """Return csrc/cuda/layout.h: a struct of offsets for each record, and the constants."""
    constants = f"constexpr int {', '.join(f'{name.lower()} = {globals()[name]}' for name in CONSTANTS)};"
    lines = [
        "// The records of a plan, for the CUDA kernels. kernels/layout.py, which says what the fields",
        "// mean, writes this file:",
        "// python -m fusedmoe.kernels.layout csrc/cuda/layout.h",
        "#pragma once",
        "",
        "namespace fusedmoe::cuda {",
        "",
        *textwrap.wrap(constants, 100, subsequent_indent=" " * 14),
        "",
    ]
    for record in RECORDS:
        name = record.name.title().replace("_", "") + "Record"
        offsets = [f"{field} = {getattr(record, field)}" for field in record.fields]
        declared = f"static constexpr int {', '.join([*offsets, f'size = {record.size}'])};"
        lines += [
            f"struct {name} {{",
            *textwrap.wrap(declared, 100, initial_indent="  ", subsequent_indent=" " * 23),
            "};",
        ]
    return "\n".join([*lines, "", "}  // namespace fusedmoe::cuda", ""])


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(header())
