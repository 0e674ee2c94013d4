"""Row-wise operations (`program.py`) as records of a plan, for both directions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fusedmoe.graph import NORM
from fusedmoe.kernels import layout
from fusedmoe.kernels.program import NOTHING, Gather, Mix, Operation, Product, Rowwise, Source, X
from fusedmoe.kernels.writer import CODES, Writer
from fusedmoe.reference.philox import threshold

WORDS = 2**32


def sources_of(operation: Operation, given: bool = True) -> list[Source]:
    """The vectors to which an operation sends a gradient. given: whether its own result has one."""
    if isinstance(operation, Gather):
        return [part.source for part in operation.parts if not part.detached]
    if isinstance(operation, Rowwise):
        return [operation.source]
    if isinstance(operation, Product):
        return [operation.a, operation.b]
    of_logits = (operation.logits, operation.query, *operation.keys)
    return [*(operation.experts if given else ()), *(source for source in of_logits if source is not None)]


class Operations:
    """Writes a segment's operations as records. In a forward they have no rows for parameters'
    gradients; a backward's plan overrides `sums` to give them some."""

    def __init__(self, writer: Writer, segment: int):
        self.writer, self.segment = writer, segment

    def sums(self, parameter: int, elements: Iterable[int], given: bool = True, mixing: Sequence[int] = ()) -> int:
        """The first of the rows of dw to which an operation writes gradients of elements of a parameter,
        one a row, unless it is not `given`; or NOTHING. mixing: the columns of the mixing weights whose
        gradients are theirs too."""
        return NOTHING

    def at(self, source: Source) -> list[int]:
        return self.writer.place(source.segment, source.column)

    def record(self, operation: Operation, p: int, given: bool = True) -> tuple[int, int]:
        """The kind of an operation, and the place of its record. p: first row of a unit's softmax."""
        place = self.writer.place(self.segment, operation.column)
        if isinstance(operation, Gather):
            return layout.GATHER_KIND, self.gather(operation, place)
        if isinstance(operation, Rowwise):
            return layout.STAGE_KIND, self.stage(operation, place)
        if isinstance(operation, Mix):
            return layout.MIX_KIND, self.mix(operation, p, given)
        a, b = self.at(operation.a), self.at(operation.b)
        return layout.PRODUCT_KIND, self.writer.put(layout.PRODUCT.pack(place=place, width=operation.width, a=a, b=b))

    def zero(self, source: Source) -> tuple[int, int]:
        """The operation that makes the gradient of a vector zero."""
        return layout.ZERO_KIND, self.writer.put(layout.ZERO.pack(place=self.at(source), width=source.width))

    def gather(self, operation: Gather, place: list[int]) -> int:
        numbers, column = layout.GATHER.pack(place=place, parts=len(operation.parts)), 0
        for part in operation.parts:
            numbers += layout.PART.pack(
                place=self.at(part.source),
                first=part.first,
                width=part.width,
                column=column,
                sends=int(not part.detached),
            )
            column += part.width
        return self.writer.put(numbers)

    def stage(self, operation: Rowwise, place: list[int]) -> int:
        stage, width = operation.stage, operation.width
        slopes = self.writer.program.table.parameters[stage.slope].shape[0] if stage.slope != NOTHING else 1
        # Packed as a signed integer of the same bits.
        least = threshold(stage.dropout)
        return self.writer.put(
            layout.STAGE.pack(
                source=self.at(operation.source),
                place=place,
                width=width,
                norm=int(stage.kind == NORM),
                eps=self.writer.put_floats([stage.eps]),
                weight=stage.weight,
                bias=stage.bias,
                activation=CODES[stage.activation.name],
                parameter=self.writer.put_floats([stage.activation.parameter]),
                slope=stage.slope,
                slopes=int(slopes > 1),
                stream=stage.stream,
                threshold=least - WORDS * (least >= WORDS // 2),
                scale=self.writer.put_floats([1.0 / (1.0 - stage.dropout)]),
                d_weight=self.sums(stage.weight, range(width)),
                d_bias=self.sums(stage.bias, range(width)),
                d_slope=self.sums(stage.slope, range(slopes)),
            )
        )

    def mix(self, operation: Mix, p: int, given: bool) -> int:
        unit, nowhere = operation.unit, Source(X, 0, 0)
        source, logits = nowhere, layout.NO_LOGITS
        if operation.logits:
            source, logits = operation.logits, layout.VECTOR_LOGITS
        elif operation.query:
            source, logits = operation.query, layout.KEY_LOGITS
        elif operation.free != NOTHING:
            logits = layout.FREE_LOGITS
        numbers = layout.MIX.pack(
            unit=self.writer.unit(self.segment, unit),
            width=unit.width,
            logits=logits,
            source=self.at(source),
            columns=source.width,
            free=operation.free,
            factor=self.writer.put_floats([operation.factor]),
            channels=operation.channels,
            p=p,
            given=int(given),
            dw=self.sums(unit.static, [read.element for read in unit.reads], given, unit.mixing),
            d_free=self.sums(operation.free, [read.seen for read in unit.reads]),
        )
        keys = operation.keys or (None,) * len(unit.reads)
        for expert, key, element in zip(operation.experts, keys, operation.elements, strict=True):
            elements = range(element, element + unit.width)
            numbers += layout.MIX_READ.pack(
                place=self.at(expert),
                key=self.at(key or nowhere),
                element=element,
                d_channels=self.sums(operation.channels, elements) if given and element != NOTHING else NOTHING,
            )
        return self.writer.put(numbers)
