"""The records of a plan: one description, from which Python, Triton and CUDA have their offsets."""

import inspect
import re
from pathlib import Path

import pytest

from fusedmoe.kernels import layout

ROOT = Path(__file__).resolve().parents[1]


def test_the_cuda_header_is_what_the_layout_writes():
    assert (ROOT / "csrc/cuda/layout.h").read_text() == layout.header()


def test_triton_reads_the_offsets_of_the_layout():
    pytest.importorskip("triton")
    from fusedmoe.kernels.triton import backward, forward, records, rowwise, rowwise_backward

    found = {
        name
        for module in (records, forward, backward, rowwise, rowwise_backward)
        for name, value in vars(module).items()
        if isinstance(value, records.Offsets)
    }
    assert found == {record.name.upper() for record in layout.RECORDS}
    for module in (records, forward, backward, rowwise, rowwise_backward):
        for name, value in vars(module).items():
            if isinstance(value, records.Offsets):
                record = getattr(layout, name)
                assert value.value is record
                assert [getattr(value, field) for field in (*record.fields, "size")] == [
                    getattr(record, field) for field in (*record.fields, "size")
                ]


@pytest.mark.parametrize("record", layout.RECORDS, ids=lambda record: record.name)
def test_what_is_packed_is_unpacked(record):
    numbers = list(range(100, 100 + record.size))
    values = vars(record.unpack([7, 7, *numbers], 2))
    assert record.pack(**values) == numbers
    assert sum(len(value) if isinstance(value, tuple) else 1 for value in values.values()) == record.size


def test_a_field_that_is_missing_or_unknown_is_refused():
    with pytest.raises(TypeError, match="record term: expected dw, tiles, stride, mixing, got dw"):
        layout.TERM.pack(dw=1)
    with pytest.raises(TypeError, match=r"record source: expected place.* as place, got"):
        layout.SOURCE.pack(place=[1, 2], width=3, first=4)


def test_no_kernel_names_a_field_by_its_number():
    numbered = re.compile(r"plan\s*(\+|\()\s*\w+( \+ \w+)* \+ \d+\b(?! \*)")
    for path in (
        *(ROOT / "kernels").glob("*.py"),
        *(ROOT / "csrc/cuda").glob("*.h"),
        *(ROOT / "csrc/cuda").glob("*.cu"),
    ):
        lines = [line for line in path.read_text().splitlines() if numbered.search(line)]
        # The end of a program's tiles stands behind their beginning.
        lines = [line for line in lines if "plan(program + 1)" not in line]
        assert not lines, f"{path.name}: expected fields of layout.py, got {lines}"


def test_arguments_stand_in_the_order_of_the_kernels():
    pytest.importorskip("triton")
    from fusedmoe.kernels.triton import arguments, backward, forward, rowwise, rowwise_backward

    kinds = {
        forward.forward: arguments.ForwardArguments,
        rowwise.rowwise_forward: arguments.RowwiseArguments,
        rowwise_backward.rowwise_backward: arguments.RowwiseBackwardArguments,
        backward.backward_rows: arguments.RowsArguments,
        backward.gradients: arguments.GradientsArguments,
        backward.add_chunks: arguments.SumArguments,
    }
    for kernel, kind in kinds.items():
        given = [
            name
            for name, parameter in inspect.signature(kernel.fn).parameters.items()
            if parameter.annotation is inspect.Parameter.empty
        ]
        assert list(kind._fields) == given
