"""Mutants of the sample kernels, one at a time, and what the emulator says of each: what shows that
it can find them."""

from __future__ import annotations

from typing import NamedTuple

# How the emulator, or a sanitizer, says what it found.
WRONG = r"gemm .*expected an error of at most"
WRONG_SOFTMAX = r"softmax .*expected an error of at most"
UNWAITED = r"gemm.*expected copies to be waited for before the thread returns"
RACE = r"ThreadSanitizer: data race"


class Mutant(NamedTuple):
    """A mutant: `pattern`, which has one place in gemm.cu, becomes `instead` (`mutation.py`).

    Then the samples, built as `kind` and run by a schedule, fail as `finds` says.

    A schedule is a seed and when copies arrive.
    """

    pattern: str
    instead: str
    kind: str
    finds: str
    schedule: tuple[int, str] = (0, "lazy")


_STEP = ("sync_block();\n    $fetch($step + STAGES - 1);", "$fetch($step + STAGES - 1);")
_BEFORE = ("sync_block();\n  float* $out", "float* $out")
_AFTER = ("sync_block();\n  for (int $i = thread(); $i < $tile * $tile", "for (int $i = thread(); $i < $tile * $tile")
_SWAPPED = ("sync_block();\n    $fetch($step + STAGES - 1);", "$fetch($step + STAGES - 1);\n    sync_block();")
_WARP_BEFORE = ("sync_warp();\n    $shared[lane()] =", "$shared[lane()] =")
_WARP_AFTER = ("sync_warp();\n    if (lane() < $n) store_global", "if (lane() < $n) store_global")

# Each by a schedule that makes it show in the numbers, and by ThreadSanitizer in any.
BARRIERS = {
    "no barrier between a copy and its readers": Mutant(*_STEP, "plain", WRONG, (1, "lazy")),
    "no barrier between a copy and its readers, in threads": Mutant(*_STEP, "threads", RACE),
    "no barrier between readers and the next copy": Mutant(*_SWAPPED, "plain", WRONG, (1, "eager")),
    "no barrier between readers and the next copy, in threads": Mutant(*_SWAPPED, "threads", RACE, (0, "eager")),
    "no barrier between readers and outputs": Mutant(*_BEFORE, "plain", WRONG, (1, "lazy")),
    "no barrier between readers and outputs, in threads": Mutant(*_BEFORE, "threads", RACE),
    "no barrier between outputs and their readers": Mutant(*_AFTER, "plain", WRONG),
    "no barrier between outputs and their readers, in threads": Mutant(*_AFTER, "threads", RACE),
    # The shuffles between keep the lanes together, but order no memory.
    "no barrier of the warp before a write, in threads": Mutant(*_WARP_BEFORE, "threads", RACE),
    "no barrier of the warp after a write": Mutant(*_WARP_AFTER, "plain", WRONG_SOFTMAX),
    "no barrier of the warp after a write, in threads": Mutant(*_WARP_AFTER, "threads", RACE),
    "another barrier for every second warp": Mutant(
        "sync_block();\n  float* $out",
        "if (warp() % 2)\n    sync_block();\n  else\n    sync_block();\n  float* $out",
        "plain",
        "divergent barrier: expected",
    ),
    "warps without rows return early": Mutant(
        "float $sums[2][4][4] = {};",
        "float $sums[2][4][4] = {};\n  if (first_row + warp() / 2 * 32 >= m) return;",
        "plain",
        "early return: expected every thread at the barrier",
    ),
    "lanes without numbers leave the softmax out": Mutant(
        "const float $y = expf($x - max_lanes($x));",
        "if (lane() >= n) continue;\n    const float $y = expf($x - max_lanes($x));",
        "plain",
        "(early return|divergent warp): expected",
    ),
}

COPIES = {
    "a wait for one group too few": Mutant("wait_copies<STAGES - 2>()", "wait_copies<STAGES - 1>()", "plain", UNWAITED),
    "no wait at all": Mutant("wait_copies<STAGES - 2>();", "", "plain", UNWAITED),
    "no commit": Mutant(
        "commit_copies();\n  };", "};", "plain", "(gemm.*expected copies to be committed|" + WRONG + ")"
    ),
    "no commit of the groups without copies": Mutant(
        "commit_copies();\n  };", "if (step < steps) commit_copies();\n  };", "plain", UNWAITED
    ),
    "a stage too few": Mutant(
        "$shared + $step % STAGES * ($Of::$a_stage + $Of::$b_stage);\n    const int $at",
        "$shared + $step % 2 * ($Of::$a_stage + $Of::$b_stage);\n    const int $at",
        "plain",
        WRONG,
    ),
    "no zeros beyond the matrix": Mutant("$live ? $piece : 0", "$piece", "plain", WRONG),
}

ADDRESSES = {
    "rows of a tile at odd addresses": Mutant(
        "$line = 64, $pad = 16", "$line = 64, $pad = 8", "plain", "misaligned (copy_async|load_matrices): expected"
    ),
    "rows of a tile in the same banks": Mutant(
        "$line = 64, $pad = 16", "$line = 64, $pad = 0", "plain", "gemm .*bank conflicts: expected"
    ),
    "too little shared memory for a copy": Mutant(
        "size_t($Tiles<T, STAGES, $TURNED>::$bytes)",
        "size_t($Tiles<T, STAGES, $TURNED>::$bytes - 256)",
        "plain",
        "outside: expected copy_async of 16 bytes inside",
    ),
    "too little shared memory": Mutant(
        "$threads * sizeof(float)}",
        "$threads * sizeof(float) / 2}",
        "plain",
        "expected writes inside the 256 bytes of shared memory",
    ),
    "too little shared memory, sanitized": Mutant(
        "$threads * sizeof(float)}", "$threads * sizeof(float) / 2}", "sanitized", "AddressSanitizer: use-after-poison"
    ),
    "a row mask lost on a load": Mutant(
        "$row < live_rows && $column",
        "($row < live_rows || true) && $column",
        "plain",
        "outside: expected a load inside a tensor",
    ),
    "a row mask lost on a store": Mutant(
        "if ($row < $m && $column < $n)", "if ($column < $n)", "plain", "outside: expected a store inside a tensor"
    ),
    "a column mask lost on a store": Mutant(
        "if ($row < $m && $column < $n)",
        "if ($row < $m)",
        "plain",
        "(outside: expected a store inside|race: expected a store)",
    ),
    "blocks that write the same columns": Mutant(
        "$column = $first_column + $i % $tile;",
        "$column = $i % $tile;",
        "plain",
        "race: expected a store to what no other block writes",
    ),
    "lanes of A exchanged": Mutant(
        "$k * int(sizeof(T)) + lane() / 16 * 16", "$k * int(sizeof(T)) + lane() / 8 % 2 * 16", "plain", WRONG
    ),
    "lanes of B exchanged": Mutant(
        "$k * int(sizeof(T)) + lane() / 8 % 2 * 16", "$k * int(sizeof(T)) + lane() % 2 * 16", "plain", WRONG
    ),
    "lanes of C exchanged": Mutant("8 * $half + lane() / 4,", "8 * $half + lane() % 8,", "plain", WRONG),
    "B not transposed": Mutant("load_matrices<2, true>", "load_matrices<2>", "plain", WRONG),
}

MUTANTS = {**BARRIERS, **COPIES, **ADDRESSES}
# One of each way to find a mutant.
QUICK = (
    "no barrier between readers and the next copy",
    "no wait at all",
    "another barrier for every second warp",
    "lanes of A exchanged",
)
