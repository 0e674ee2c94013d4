"""Mutants of csrc/cuda, one at a time, and the ordinary test that fails with each: what shows that
the tests can fail."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ..mutation import mutated
from . import extension, run

# How a test, the emulator or a sanitizer says what it found.
WRONG = r"\d+ of \d+ differ, the worst in"
NUMBERS = rf"{WRONG}|race: expected"
# A list of what differs.
LIST = r"assert \['"
# An address that nobody has written yet.
UNKNOWN = r"misaligned source of copy_async: expected an address at a multiple of 16 bytes, got 0xf+"
RACE = r"ThreadSanitizer: data race"
OUTSIDE = r"outside: expected a (load|store) inside a tensor"
UNWAITED = r"expected copies to be waited for before the thread returns"
UNCOMMITTED = r"expected copies to be committed before the thread returns"
# A wild address ends the process.
WILD = r"Fatal Python error: (Segmentation fault|Bus error)|assert False"


class Mutant(NamedTuple):
    """A mutant: `pattern`, which has one place in `file` of csrc/cuda, becomes `instead`
    (`mutation.py`).

    Then `test`, with `unit` compiled anew as `kind`, fails as `finds` says.

    A schedule is a seed and when copies arrive.
    """

    file: str
    pattern: str
    instead: str
    unit: str
    kind: str
    test: str
    finds: str
    schedule: tuple[int, str] = (0, "lazy")


_FOLDER = "tests/cuda_on_cpu/emulated/"


def _matrix(name: str, dtype: str, form: str) -> str:
    return f"{_FOLDER}test_matrix.py::test_matrix[{name}-torch.{dtype}-{form}]"


_INFINITE = "tests/test_parity.py::test_what_is_infinite_stays_where_it_reaches[{}-cuda]"
_BFLOAT16, _FLOAT32, _BACKWARD = "forward_bfloat16", "forward_float32", "backward"
_WHOLE, _LEVELS = (
    _matrix("whole vectors", "bfloat16", "one launch"),
    _matrix("whole vectors", "bfloat16", "a launch a level"),
)
_ODD, _FEATURES = _matrix("odd", "float32", "a launch a level"), _matrix("every feature", "float32", "a launch a level")

_STEP = ("tile.h", "sync_block();\n    $fetch($place(STAGES - 1));", "$fetch($place(STAGES - 1));")
_FINISH = ("tile.h", "wait_copies<0>();\n    sync_block();\n  }", "wait_copies<0>();\n  }")
_SUMS = ("backward.h", "= sum;\n        }\n      sync_block();", "= sum;\n        }")
_UNIT = ("columns.h", "sync_warp();\n  $P::$visit(", "$P::$visit(")
_PART = ("columns.h", "$low, $high); });\n  sync_warp();", "$low, $high); });")

BARRIERS = {
    "no barrier between a copy and its readers": Mutant(*_STEP, _BFLOAT16, "plain", _WHOLE, UNKNOWN, (1, "lazy")),
    "no barrier between a copy and its readers, in threads": Mutant(*_STEP, _FLOAT32, "threads", _ODD, RACE),
    "no barrier between logits and their softmax": Mutant(*_FINISH, _BFLOAT16, "plain", _WHOLE, WRONG, (1, "lazy")),
    "no barrier between partial sums and their sum": Mutant(*_SUMS, _BACKWARD, "plain", _LEVELS, WRONG, (1, "lazy")),
    "no barrier of the warp before a write, in threads": Mutant(*_UNIT, _FLOAT32, "threads", _ODD, RACE),
    "no barrier of the warp after a write": Mutant(*_PART, _BFLOAT16, "plain", _WHOLE, WRONG, (1, "lazy")),
    "no barrier between a chunk's parts and its arrival": Mutant(
        "gradients.h", "where $the $flag $does.\n    sync_block();", "where $the $flag $does.", _BACKWARD, "plain", _ODD, NUMBERS, (1, "lazy")
    ),
    "another barrier for every second warp": Mutant(
        "forward.h", "sync_block();\n  }\n}", "if (warp() % 2)\n      sync_block();\n    else\n      sync_block();\n  }\n}",
        _BFLOAT16, "plain", _WHOLE, "divergent barrier: expected",
    ),
    "warps without rows return early": Mutant(
        "forward.h", "const int $program = $call.$place + 2 * block_y();",
        "const int $program = $call.$place + 2 * block_y();\n  if (warp() % Of::P::down * 16 >= of.block().live) return;",
        _BFLOAT16, "plain", _LEVELS, "early return: expected every thread at the barrier",
    ),
}  # fmt: skip

COPIES = {
    "a wait for one group too few": Mutant("tile.h", "wait_copies<STAGES - 2>()", "wait_copies<STAGES - 1>()", _BFLOAT16, "plain", _WHOLE, WRONG),
    "no wait": Mutant("tile.h", "wait_copies<STAGES - 2>();", "", _BFLOAT16, "plain", _WHOLE, WRONG),
    "no commit": Mutant(
        "tile.h", "$fetch($place(STAGES - 1));\n    commit_copies();", "$fetch($place(STAGES - 1));", _BFLOAT16, "plain", _WHOLE,
        f"{UNCOMMITTED}|{WRONG}",
    ),
    "a copy to the stage that is read": Mutant(
        "tile.h", "$fetch($place(STAGES - 1));", "$fetch($place(STAGES));", _BFLOAT16, "plain", _WHOLE, WRONG, (0, "eager")
    ),
    "no zeros beyond a row": Mutant("tile.h", "$live ? 16 : 0", "16", _BFLOAT16, "plain", _WHOLE, WRONG),
}  # fmt: skip

ADDRESSES = {
    "rows of a panel at odd addresses": Mutant(
        "tile.h", "($ACROSS && $size == 4 ? 32 : 16)", "($ACROSS && $size == 4 ? 32 : 8)", _BFLOAT16, "plain", _WHOLE,
        r"misaligned (copy_async|load_matrices): expected",
    ),
    "too little shared memory": Mutant(
        "forward_instances.h", "size_t($Of::$bytes($tiles.$keep))", "size_t($Of::$bytes($tiles.$keep)) - 512", _BFLOAT16, "plain", _WHOLE,
        r"expected writes inside the \d+ bytes of shared memory|outside: expected copy_async",
    ),
    "too little shared memory, sanitized": Mutant(
        "forward_instances.h", "size_t($Of::$bytes($tiles.$keep))", "size_t($Of::$bytes($tiles.$keep)) - 512", _FLOAT32, "sanitized", _ODD,
        "AddressSanitizer: use-after-poison",
    ),
    "a row mask lost on a load": Mutant("tile.h", "if ($row >= $live) return -1;", "", _BFLOAT16, "plain", _WHOLE, OUTSIDE),
    "a row mask lost on a store": Mutant("columns.h", "$first_row + $row >= $rows ||", "", _BFLOAT16, "plain", _WHOLE, rf"{OUTSIDE}|race: expected a store"),
    "a column mask lost on a store": Mutant(
        "columns.h", "|| $first_column + $column >= $columns.$live) continue;", ") continue;", _FLOAT32, "plain", _ODD, rf"{OUTSIDE}|{NUMBERS}"
    ),
    "a row mask lost on a store of the backward": Mutant(
        "columns.h", "$first_row + $row >= $rows ||", "", _BACKWARD, "plain", _WHOLE, rf"{OUTSIDE}|race: expected a store"
    ),
    "lanes of A exchanged": Mutant(
        "tile.h", "$k * $PanelA::$size + lane() / 16 * 16", "$k * $PanelA::$size + lane() / 8 % 2 * 16", _BFLOAT16, "plain", _WHOLE, WRONG
    ),
    "lanes of B exchanged": Mutant(
        "tile.h", "($first + lane() / 16 * 8 + lane() % 8) * PanelB::$pitch", "($first + lane() / 8 % 2 * 8 + lane() % 8) * PanelB::$pitch",
        _BFLOAT16, "plain", _WHOLE, WRONG,
    ),
    "lanes of C exchanged": Mutant("tile.h", "* 16 + $half * 8 + lane() / 4;", "* 16 + $half * 8 + lane() % 8;", _BFLOAT16, "plain", _WHOLE, NUMBERS),
    "an offset cut to 32 bits": Mutant(
        "records.h", "$before + $row * $distance, int($distance)}", "$before + int($row) * int($distance), int($distance)}", _FLOAT32, "plain",
        f"{_FOLDER}test_matrix.py::test_rows_beyond_32_bits", WILD,
    ),
    "an offset cut to 32 bits, sanitized": Mutant(
        "records.h", "$before + $row * $distance, int($distance)}", "$before + int($row) * int($distance), int($distance)}", _FLOAT32, "sanitized",
        f"{_FOLDER}test_matrix.py::test_rows_beyond_32_bits", "runtime error: signed integer overflow",
    ),
}  # fmt: skip

FORMULAS = {
    "an expert's rows of W from the first on": Mutant(
        "prefetch.h", "+ int64_t($row) * $b_distance + $column", "+ $column", _FLOAT32, "plain", _matrix("whole vectors", "float32", "a launch a level"), WRONG
    ),
    "the softmax of another unit": Mutant(
        "forward.h", "+ $g::$size + $call.$units + $u) + $read)", "+ $g::$size + $call.$units) + $read)", _BFLOAT16, "plain", _WHOLE, NUMBERS
    ),
    "static weights left out": Mutant(
        "forward.h", "$part.$p[$turn] + $part.$v[$turn]", "$part.$p[$turn]", _FLOAT32, "plain", _FEATURES, WRONG
    ),
    "what is not seen has weight": Mutant("forward.h", "plan($outputs.$list + $read) < 0 ? -INFINITY : $value", "$value", _FLOAT32, "plain", _FEATURES, WRONG),
    "terms of the softmax's gradient exchanged": Mutant(
        "backward.h", "$weight_gradient($selection, $first + $i) - $of.$mean - $of.$rest", "$of.$mean + $of.$rest - $weight_gradient($selection, $first + $i)",
        _BACKWARD, "plain", _WHOLE, WRONG,
    ),
    "a derivative left out": Mutant(
        "backward.h", "$dy.$at[$m][$n][$k] * $act.$slope($at, $parameter)", "$dy.$at[$m][$n][$k]", _BACKWARD, "plain", _WHOLE, WRONG
    ),
    "a source's gradient not added to what is there": Mutant(
        "backward.h", "if (plan($record + $r::$add) != 0) $add_tile", "if (false) $add_tile", _BACKWARD, "plain", _FEATURES, WRONG
    ),
    "what is beside hidden outputs handed on": Mutant(
        "mainloop.h", "$one ? $low : 0.0f, $both ? $high : 0.0f);", "$one ? $low : $low, $both ? $high : $high);", _FLOAT32, "plain",
        _INFINITE.format("a hidden layer"), "assert False",
    ),
    "what is beside an expert's columns in its weights' gradient": Mutant(
        "backward.h", "if ($column >= $columns.$live) $low = 0.0f;", "", _BACKWARD, "plain", _INFINITE.format("one layer"), LIST
    ),
    "the last chunk not added": Mutant("gradients.h", "$chunk < blocks_y(); $chunk++", "$chunk < blocks_y() - 1; $chunk++", _BACKWARD, "plain", _ODD, WRONG),
    "a gradient of another expert's columns": Mutant(
        "gradients.h", "$call.$of.$dz_row + plan($at);", "$call.$of.$dz_row;", _BACKWARD, "plain", _WHOLE, WRONG
    ),
}  # fmt: skip

_ROWWISE = f"{_FOLDER}test_rowwise.py::"


def _table(name: str, form: str = "a launch a level") -> str:
    return f"{_ROWWISE}test_tables[{name}-torch.float32-{form}]"


_STAGES, _GATHERS, _MIXES = _table("stages, odd"), _table("gathers, odd"), _table("mixes, odd")
_DROPOUT = f"{_ROWWISE}test_dropout_is_philox[7-torch.float32]"

ROWWISE = {
    "no barrier of the warp between operations": Mutant(
        "rowwise.h", "sync_warp();\n      if ($kind == gather_kind)", "if ($kind == gather_kind)", "rowwise", "plain", _table("copies"), WRONG, (1, "lazy")
    ),
    "no barrier of the warp between parts of a vector, in threads": Mutant(
        "rowwise.h", "sync_warp();\n      T* $to = gradients($part", "T* $to = gradients($part", "rowwise", "threads", _GATHERS, RACE
    ),
    "no barrier of the warp between logits and their softmax, in threads": Mutant(
        "rowwise_mix.h", "store_logits($of);\n    sync_warp();", "store_logits($of);", "rowwise", "threads", _MIXES, RACE
    ),
    "no barrier of the warp between a softmax and its mix": Mutant(
        "rowwise_mix.h", "normalize($of);\n    sync_warp();", "normalize($of);", "rowwise", "plain", _MIXES, WRONG, (1, "lazy")
    ),
    "rows beyond the last one": Mutant(
        "rowwise.h", "if ($row < $call.$of.$network.$rows) Rowwise", "Rowwise", "rowwise", "plain", _STAGES, rf"{OUTSIDE}|race: expected a load"
    ),
    "what counts arrivals not made zero": Mutant(
        "rowwise.h", "store_global($call.$of.$arrived + $i, 0);", ";", "rowwise", "plain", _table("copies"), WRONG
    ),
    "a slope a column where there is one": Mutant(
        "rowwise.h", "value($slope, $slopes * $column)", "value($slope, $column)", "rowwise", "plain", _STAGES, OUTSIDE
    ),
    "a mean left out of LayerNorm's gradient": Mutant(
        "rowwise.h", "($d_z - $mean - $o * $along)", "($d_z - $o * $along)", "rowwise", "plain", _STAGES, WRONG
    ),
    "a variance around zero": Mutant(
        "rowwise.h", "value($of.$h, $column) - $of.$mean;", "value($of.$h, $column);", "rowwise", "plain", _STAGES, WRONG
    ),
    "what is dropped and what is kept exchanged": Mutant(
        "rowwise.h", "$word < uint32_t(", "$word >= uint32_t(", "rowwise", "plain", _DROPOUT, WRONG
    ),
    "the random word of another column": Mutant("philox.h", "$column % 4 < 2", "$column % 2 < 1", "rowwise", "plain", _DROPOUT, WRONG),
    "the random words of another stream": Mutant("philox.h", "uint32_t($column / 4), uint32_t($stream)", "uint32_t($column / 4), 0", "rowwise", "plain", _DROPOUT, WRONG),
    "what is dropped multiplied by zero": Mutant(
        "rowwise.h", "? 0.0f : $x * number(", "? 0.0f * $x : $x * number(", "rowwise", "plain", f"{_ROWWISE}test_a_dropped_number_is_zero_whatever_it_is", "assert"
    ),
    "a temperature left out": Mutant("rowwise_mix.h", "number($of.$record + $r::$factor) * $z", "$z", "rowwise", "plain", _MIXES, WRONG),
    "weights a column left out": Mutant(
        "rowwise_mix.h", "$sum += ($v ? $w + value($v, $column) : $w)", "$sum += $w", "rowwise", "plain", _MIXES, WRONG
    ),
    "a mean left out of the softmax's gradient": Mutant(
        "rowwise_mix.h", "$p * ($d - $off - $rest)", "$p * $d", "rowwise", "plain", _MIXES, WRONG
    ),
    "the first reads again beyond a warp": Mutant(
        "rowwise_mix.h", "$pass == 0 || $of.$reads > 32", "$pass == 0", "rowwise", "plain", _table("mixes of more than a warp"), WRONG
    ),
    "a gradient of what has none": Mutant(
        "rowwise_mix.h", "$given && $read < $end", "$read < $end", "rowwise", "plain", _table("branches"), f"{OUTSIDE}|{WRONG}"
    ),
    "a product's gradient by the same factor": Mutant(
        "rowwise.h", "add(d_b, $column, value($g, $column) * value(a, $column))", "add(d_b, $column, value($g, $column) * value(b, $column))",
        "rowwise", "plain", _MIXES, WRONG,
    ),
    "a detached part's gradient": Mutant("rowwise.h", "if (plan($part + $r::$sends) == 0) return;", "", "rowwise", "plain", _GATHERS, f"{OUTSIDE}|{WRONG}"),
    "the first use alone of a shared weight": Mutant(
        "gradients.h", "$rows = (1 + $uses) *", "$rows = 1 *", _BACKWARD, "plain", _table("shares, odd"), WRONG
    ),
    "the same rows of each use of a shared weight": Mutant(
        "gradients.h", "$b = $block.rows_of($next + MatrixUseRecord::$source);", "", _BACKWARD, "plain", _table("shares, odd"), f"{OUTSIDE}|{WRONG}"
    ),
}  # fmt: skip

MUTANTS = {**BARRIERS, **COPIES, **ADDRESSES, **FORMULAS, **ROWWISE}
# Found in half a minute; others take up to two.
QUICK = ("a row mask lost on a load",)


def built(mutant: Mutant, folder: Path) -> Path:
    """Return the extension with a mutant, of whose sources `unit` alone is compiled anew.

    Raises: SystemExit naming what does not compile.
    """
    extension.build(mutant.kind)
    sources = folder / "csrc" / "cuda"
    sources.mkdir(parents=True)
    for path in (run.ROOT / "csrc" / "cuda").iterdir():
        text = path.read_text()
        (sources / path.name).write_text(
            mutated(text, mutant.pattern, mutant.instead) if path.name == mutant.file else text
        )
    # Once run, they need not be fast.
    (changed,) = run.compiled(mutant.kind, [sources / f"{mutant.unit}.cu"], folder, ["-O1"], folder / "csrc")
    common, whole = (run.ROOT / "build" / f"cuda_on_cpu-{mutant.kind}{part}" for part in ("", "-extension"))
    objects = [common / f"{source.stem}.o" for source in run.EMULATOR]
    objects += [
        whole / f"{source.stem}.o"
        for source in (*extension.sources(), *extension.OPERATORS)
        if source.stem != mutant.unit
    ]
    library = folder / "_cuda.so"
    # The changed one first: of a function that several have, the linker takes the first.
    extension.link(mutant.kind, [changed, *objects], library)
    return library
