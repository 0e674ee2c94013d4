"""Mutants of the kernels, one at a time, and the ordinary test that fails with each: what shows
that the tests can fail.

What none of them can notice, and so none is here: a missing barrier, because programs and threads
take turns here.
"""

from __future__ import annotations

from typing import NamedTuple

# Where a test runs: kernels in Triton's interpreter, or as compiled PTX that is executed.
INTERPRETED, EXECUTED = "interpreted", "executed"

# How a test says what it found.
WRONG = r"\d+ of \d+ differ, the worst in"
# What lies behind a tensor may be one of another dtype.
OUTSIDE = r"expected (a (read|write) inside a tensor|whole elements of \d+ bytes)"
SHARED = r"expected elements (that no other program of the launch writes|of this program alone)"
LAUNCHES = r"assert \([\d., ]+\) == \([\d., ]+\)"
MISALIGNED = r"expected a (read|write) at a multiple of \d+ bytes"
NOT_FINITE = r"assert \['.*'\] == \[\]"
# Memory is not watched where it spans 2^31 numbers.
WILD = r"Fatal Python error: (Segmentation fault|Bus error)|assert torch\.equal"


class Mutant(NamedTuple):
    """A mutant: `pattern`, which has one place in `file` of `kernels/`, becomes `instead`
    (`mutation.py`).

    Then the test `test`, run where `rung` says, fails as `finds` says.
    """

    file: str
    pattern: str
    instead: str
    rung: str
    test: str
    finds: str


def _parity(case: str) -> str:
    return f"tests/test_parity.py::test_parity[{case}-triton-torch.float32]"


def _of_width(width: int) -> str:
    return f"tests/test_parity.py::test_parity_of_every_kind_of_width[{width}-triton]"


def _executed(case: str) -> str:
    return f"tests/gpu_free/test_executed.py::test_parity[{case}]"


def _by_hand(operation: str) -> str:
    return f"tests/test_operations.py::test_a_backend_is_the_reference[triton-{operation}-torch.float32]"


_DROPOUT = "tests/test_dropout.py::test_every_backend_drops_the_same[of a norm-triton-torch.float32]"
_ACCESSES = "tests/gpu_free/interpreted/test_accesses.py"
_SIZES = "tests/gpu_free/interpreted/test_sizes.py"
_WATCHED = f"{_ACCESSES}::test_accesses[mmoe-odd-a launch a level]"
_TILES = f"{_SIZES}::test_several_tiles_of_columns"
_CHUNKS = f"{_SIZES}::test_several_chunks[narrow]"

MEMORY = {
    "a row mask lost on a load": Mutant(
        "triton/records.py",
        "$rows[:, None] * $stride + $k[None, :], mask=$block.$live[:, None] & $inside[None, :],",
        "$rows[:, None] * $stride + $k[None, :], mask=$inside[None, :],",
        INTERPRETED, _WATCHED, OUTSIDE,
    ),
    "a row mask lost on a store": Mutant(
        "triton/forward.py", "element_ty), mask=$block.$live[:, None] & $live[None, :])", "element_ty), mask=$live[None, :])", INTERPRETED, _WATCHED, OUTSIDE
    ),
    "a column mask lost on a load": Mutant(
        "triton/records.py",
        "(column + $k)[:, None], mask=$inside[:, None] & $live[None, :],",
        "(column + $k)[:, None], mask=$inside[:, None],",
        INTERPRETED, _WATCHED, OUTSIDE,
    ),
    "a column mask lost on a store": Mutant(
        "triton/backward.py", "$d, mask=($n < $outputs)[:, None] & $live_k[None, :])", "$d, mask=$live_k[None, :])", INTERPRETED, _CHUNKS, SHARED
    ),
    "an offset cut to 32 bits": Mutant(
        "triton/records.py",
        "($before + $block.$row * $distance) * $size",
        "($before + ($block.$row * $distance).to(tl.int32)) * $size",
        INTERPRETED, f"{_ACCESSES}::test_rows_beyond_32_bits", WILD,
    ),
    "rows too far apart for a chunk": Mutant(
        "operator.py", "$bound.$chunk_of($x.$shape[0]) < 2**31", "64 < 2**31", INTERPRETED, f"{_ACCESSES}::test_rows_of_a_chunk_beyond_32_bits", WILD
    ),
    "two programs at one row of softmax": Mutant(
        "plan.py", "$rows if len($stages) == 1 or $column + $columns >=", "$rows if $column + $columns >=", INTERPRETED, _TILES, SHARED
    ),
    "two programs at one row of dw": Mutant("backward_plan.py", "dw=$first + $tile * $stride + $place,", "dw=$first + $place,", INTERPRETED, _TILES, SHARED),
    "two programs at one dz of a gate": Mutant("backward_plan.py", "store=$column == 0", "store=True", INTERPRETED, _TILES, SHARED),
    "two programs at one bias's gradient": Mutant("backward_plan.py", "$first == 0 and $column == 0", "$first == 0", INTERPRETED, _TILES, SHARED),
    "alignment claimed of odd widths": Mutant(
        "bound.py", "return $lanes if $whole else 1", "return $lanes", EXECUTED, _executed("ple-torch.bfloat16-one launch"), MISALIGNED
    ),
    "alignment claimed of odd outputs": Mutant(
        "bound.py", "$align if $aligned($sizes, $align) else 1", "$align",
        EXECUTED, "tests/gpu_free/test_executed.py::test_outputs_of_odd_widths", MISALIGNED,
    ),
    "alignment claimed of any address": Mutant(
        "bound.py", "$aligned16 and $x.data_ptr() % 16 == 0 and", "",
        EXECUTED, "tests/gpu_free/test_executed.py::test_parameters_at_odd_addresses", MISALIGNED,
    ),
}  # fmt: skip

FORWARD = {
    "an expert's rows of W from the first on": Mutant(
        "triton/records.py",
        "$weight + tl.cast($first, tl.int64) * $reduction, $shape.$BYTES)\n    $hidden = -1",
        "$weight, $shape.$BYTES)\n    $hidden = -1",
        INTERPRETED, _of_width(47), WRONG,
    ),
    "a hidden layer's rows of W from the first on": Mutant(
        "triton/records.py",
        "$weight + tl.cast($first, tl.int64) * $reduction, $shape.$BYTES)\n    $z = $product(",
        "$weight, $shape.$BYTES)\n    $z = $product(",
        INTERPRETED, f"{_SIZES}::test_inference[wide-0]", WRONG,
    ),
    "the bias of other columns": Mutant(
        "triton/records.py", "$pointer($block, $bias) + $first + $outputs", "$pointer($block, $bias) + $outputs",
        INTERPRETED, _of_width(47), WRONG,
    ),
    "rows of W at the width of one source": Mutant(
        "triton/records.py", "$weight + $outputs[None, :] * $reduction + (column + $k)", "$weight + $outputs[None, :] * width + (column + $k)",
        INTERPRETED, _parity("customized_sharing-odd"), WRONG,
    ),
    "a softmax over experts that are not seen": Mutant(
        "triton/forward.py", "tl.where($seen[None, :] >= 0, $z, $NEVER)", "tl.where($seen[None, :] >= 0, $z, 0.0)", INTERPRETED, _parity("ml_mmoe-one_row"), WRONG
    ),
    "all slots taken for one": Mutant(
        "bound.py", "$found if $key.$apart or $found.$table.$graph.$inputs[0].$slots == 1 else $program.$of_one_slot($found)", "$program.$of_one_slot($found)",
        INTERPRETED, _parity("adatt_sp-odd"), WRONG,
    ),
    "gates that all read one source": Mutant(
        "plan.py", "$unit.$gate.$read[0] if $unit.$gate else $Source($X, 0, 0)", "units[0].$gate.$read[0]",
        EXECUTED, _executed("ple-torch.bfloat16-one launch"), WRONG,
    ),
    "experts that all read the first piece of a source": Mutant(
        "triton/records.py", "tl.dot($h[$piece], $w, $z,", "tl.dot($h[0], $w, $z,", EXECUTED, _executed("adatt_sp, whole vectors-torch.bfloat16-one launch"), WRONG
    ),
    "static weights left out": Mutant(
        "triton/forward.py", "+ $static_weight($block, tl.load($block.plan + $units + $u), $read)", "", INTERPRETED, _parity("cross_stitch-tiny"), WRONG
    ),
    "the softmax of another unit": Mutant(
        "triton/forward.py", "(tl.load($block.plan + $units + $UNITS + $u) + $read)", "(tl.load($block.plan + $units + $UNITS) + $read)",
        INTERPRETED, _parity("mmoe-odd"), WRONG,
    ),
    "what stands beyond a hidden layer": Mutant(
        "triton/records.py", "tl.where($inside[None, :], $activated($block, $shape, $hidden, $y), 0.0)", "$activated($block, $shape, $hidden, $y)",
        INTERPRETED, f"{_SIZES}::test_an_infinite_input[tanh]", NOT_FINITE,
    ),
    "one product of tf32 instead of three": Mutant(
        "bound.py", 'return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"', 'return "tf32"',
        EXECUTED, _executed("ple-torch.float32-one launch"), WRONG,
    ),
    "a launch for every stage": Mutant(
        "plan.py", "else $program.$levels:", "else tuple((segment,) for segment in range(len($program.segments))):",
        INTERPRETED, f"{_ACCESSES}::test_launches[towers1-1]", LAUNCHES,
    ),
}  # fmt: skip

BACKWARD = {
    "terms of the softmax's gradient exchanged": Mutant(
        "triton/backward.py", "$soft * ($d - $rest)", "$soft * ($rest - $d)", INTERPRETED, _parity("adatt-empty_gate"), WRONG
    ),
    "a sum computed again in another layout": Mutant(
        "triton/backward.py", "while $times < 1:", "if $times < 1:", EXECUTED,
        "tests/gpu_free/test_executed.py::test_split_numbers_are_those_of_one_sum", WRONG,
    ),
    "a derivative left out": Mutant("triton/backward.py", "0.0, $dy * $slope)", "0.0, $dy)", INTERPRETED, _of_width(17), WRONG),
    "a static weight left out of dy": Mutant(
        "triton/backward.py", "$w += $static_weight($block, tl.load($block.plan + $reader + $r.$unit), tl.load($block.plan + $reader + $r.$read))", "",
        INTERPRETED, _parity("cross_stitch-tiny"), WRONG,
    ),
    "dz without zeros behind it": Mutant(
        "triton/backward.py", "($columns < $padded($width) - $column)[None, :]", "inside[None, :]", INTERPRETED, _of_width(17), WRONG
    ),
    "gradients of the mixing weights left out": Mutant(
        "triton/backward.py", "$d += tl.load(given, mask=$live, other=0.0).to(tl.float32)", "", INTERPRETED, _parity("mmoe-odd"), WRONG
    ),
    "a source's gradient not added to what is there": Mutant(
        "backward_plan.py", "int($source in $self.$written)", "0", INTERPRETED, _parity("mmoe-odd"), WRONG
    ),
    "the last chunk not added": Mutant("triton/backward.py", "for $chunk in range(chunks):", "for $chunk in range(chunks - 1):", INTERPRETED, _CHUNKS, WRONG),
    "what stands beyond an expert": Mutant(
        "triton/backward.py", "tl.where($inside[None, :], $expert($block, $shape, $one, $column, $columns, $inside), 0.0)",
        "$expert($block, $shape, $one, $column, $columns, $inside)", INTERPRETED, f"{_SIZES}::test_an_infinite_input[tanh]", NOT_FINITE,
    ),
}  # fmt: skip

ROWWISE = {
    "eps left out": Mutant("triton/rowwise.py", "$square / $width + $eps", "$square / $width", INTERPRETED, _by_hand("LayerNorm without parameters"), WRONG),
    "one slope for all columns": Mutant(
        "triton/rowwise.py", "(column + tl.arange(0, $kind.$BLOCK_H)) * tl.load($block.plan + $stage + $STAGE.slopes)",
        "tl.arange(0, $kind.$BLOCK_H) * 0", INTERPRETED, _by_hand("PReLU by column"), WRONG,
    ),
    "a part from the first column on": Mutant(
        "triton/rowwise.py", "$part + PART.place, $there + $column, $there + $width", "$part + PART.place, $column, $width",
        INTERPRETED, _by_hand("some columns"), WRONG,
    ),
    "logits without their factor": Mutant(
        "triton/rowwise.py", "return $z * tl.load($block.floats + tl.load($block.plan + $mix + $MIX.factor))", "return $z",
        INTERPRETED, _by_hand("a temperature"), WRONG,
    ),
    "static weights of the first expert's columns": Mutant(
        "triton/rowwise.py", "$channels, $element, $column, $width, 0.0", "$channels, 0, $column, $width, 0.0",
        INTERPRETED, _by_hand("static weights by column"), WRONG,
    ),
    "random words in another order": Mutant(
        "triton/rowwise.py", "tl.interleave(tl.interleave($a, $c), tl.interleave($b, $d))",
        "tl.interleave(tl.interleave($a, $b), tl.interleave($c, $d))", INTERPRETED, _DROPOUT, "assert",
    ),
    "the words of another dropout": Mutant(
        "triton/rowwise.py", "$none + tl.load($block.plan + $stage + $STAGE.stream).to(tl.uint32)", "$none", INTERPRETED, _DROPOUT, "assert"
    ),
    "what is kept not scaled": Mutant("triton/rowwise.py", "$value * $scale, 0.0)", "$value, 0.0)", INTERPRETED, _DROPOUT, "assert"),
    "a gradient of what is detached": Mutant(
        "triton/rowwise_backward.py", "if tl.load($block.plan + $part + $PART.sends) != 0:", "if True:",
        INTERPRETED, _by_hand("a detached source"), WRONG,
    ),
    "gradients that do not begin at zero": Mutant(
        "backward_plan.py", "$records += self.zeros($write, sources_of($operation, $given))", "", INTERPRETED, _by_hand("products"), WRONG
    ),
    "a LayerNorm's gradient without what goes along it": Mutant(
        "triton/rowwise_backward.py", "- o * ($along / $width)[:, None]", "", INTERPRETED, _by_hand("LayerNorm"), WRONG
    ),
    "a slope's gradient from above zero too": Mutant(
        "triton/rowwise_backward.py", "tl.where(($z > 0.0) | ($g == 0.0), 0.0, $g * $z)", "$g * $z", INTERPRETED, _by_hand("PReLU"), WRONG
    ),
    "a key's gradient from itself": Mutant("triton/rowwise_backward.py", "$own * q)", "$own * k)", INTERPRETED, _by_hand("attention"), WRONG),
    "a factor's gradient by itself": Mutant("triton/rowwise_backward.py", "$g * b)", "$g * a)", INTERPRETED, _by_hand("products"), WRONG),
    "a row mask lost on dw": Mutant(
        "triton/rowwise_backward.py", "$block.row + $block.rows, $value, mask=$block.live)", "$block.row + $block.rows, $value)",
        INTERPRETED, f"{_ACCESSES}::test_accesses_of_operations[PReLU-one launch]", f"{OUTSIDE}|{SHARED}",
    ),
    "one use of a shared W": Mutant(
        "triton/backward.py", "range(tl.load($block.plan + $uses + $FURTHER_USES.uses))", "range(0)",
        INTERPRETED, _by_hand("a linear map of two experts"), WRONG,
    ),
}  # fmt: skip

MUTANTS = {**MEMORY, **FORWARD, **BACKWARD, **ROWWISE}
# One of each way to find a mutant, in seconds.
QUICK = (
    "a row mask lost on a store",
    "a softmax over experts that are not seen",
    "a launch for every stage",
    "alignment claimed of odd widths",
)
