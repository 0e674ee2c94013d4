"""FUSEDMOE_AUTOTUNE=1: tiles by the clock, a few candidates beside the shipped choice, timed once
and kept on disk.

A choice is made by the first call of its `Key` on a device. It stands in a file of its own, so that
processes need no lock: each writes a whole file aside and moves it into place, and the last one
wins. Bits of a result may depend on the tiles, and so on what was found the fastest.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from fusedmoe.kernels import bound, device, network, tiles
from fusedmoe.kernels.lowering import lower
from fusedmoe.kernels.program import Program
from fusedmoe.kernels.tiles import Tiles
from fusedmoe.table import Table

# The sizes that are tried, each from its least to its most: half and twice the shipped one, or one
# more and one less. 16 is the least of an MMA; 16 warps of 255 registers a thread exceed a
# multiprocessor's.
LIMITS = {
    "rows": (16, 128),
    "columns": (16, 128),
    "warps": (2, 8),
    "outputs": (16, 128),
    "stages": (1, 4),
    "ahead": (1, 4),
}
ONE_BY_ONE = ("stages", "ahead")
# The sizes that a forward (False) and a backward (True) have no use for.
UNUSED = {False: "outputs", True: "ahead"}
# What Triton raises for a tile that this device cannot run: its compiler's passes a bare
# RuntimeError. One of the device's that is none of the tile's comes again in the next call.
UNFIT = (OutOfResources, PTXASError, CompilationError, RuntimeError)
# Milliseconds of warm-up and of calls that are timed, a candidate.
WARM_UP, TIMED = 5, 20
# Whose tiles are tuned: CUDA's kernels come compiled.
BACKEND = "triton"
# Devices whose time `milliseconds` can tell; Triton's interpreter has none.
TIMED_DEVICES = ("cuda",)
_CHOSEN: dict[Key, Tiles] = {}
# Two threads that tuned at once would time each other.
_TUNING = threading.Lock()


class Key(NamedTuple):
    """What a choice depends on. work: "inference", "training" or "backward"; table: a digest of its
    text; rows: the least power of two that is no smaller; slots: in memory, one where all are the
    same; kernels: a digest of their sources, and of the list of candidates.
    """

    work: str
    table: str
    mixing: bool
    slots: int
    dtype: str
    precision: str
    rows: int
    align: int
    arch: str
    device: str
    triton: str
    kernels: str


@functools.cache
def enabled() -> bool:
    """Whether FUSEDMOE_AUTOTUNE asks for it; read once a process.

    Raises: ValueError for a value that is neither 0 nor 1.
    """
    value = os.environ.get("FUSEDMOE_AUTOTUNE", "0")
    if value not in ("0", "1"):
        raise ValueError(f"FUSEDMOE_AUTOTUNE: expected 0 or 1, got {value!r}")
    return value == "1"


def milliseconds(call: Callable[[], object]) -> float:
    """The median time of a call on the current device, by events, each call after one that empties
    its L2 cache."""
    return triton.testing.do_bench(call, warmup=WARM_UP, rep=TIMED, return_mode="median")


def of_forward(x: Tensor, params: Sequence[Tensor], table: Table, mixing: bool, training: bool) -> Tiles | None:
    """Return the tiles for `network.forward` of these arguments; None: the shipped ones."""
    if not _tunable(x):
        return None
    program = bound.program_of(bound.key_of(x, table, training, None, BACKEND))
    key = _key("training" if training else "inference", program, mixing, x, params)
    return _chosen(
        key, program, x, lambda tiles: network.forward(x, params, table, mixing, training, tiles, backend="triton")
    )


def of_backward(
    d_out: Tensor, d_weights: Tensor | None, x: Tensor, params: Sequence[Tensor], saved: network.Saved, table: Table
) -> Tiles | None:
    """Return the tiles for `network.backward` of these arguments; None: the shipped ones."""
    if not _tunable(x):
        return None
    program = lower(table)
    key = _key("backward", program, d_weights is not None and d_weights.numel() > 0, x, params)
    return _chosen(
        key,
        program,
        x,
        lambda tiles: network.flat_backward(d_out, d_weights, x, params, saved, table, tiles, backend="triton"),
    )


def _tunable(x: Tensor) -> bool:
    return enabled() and x.device.type in TIMED_DEVICES and len(x) > 0


def candidates(program: Program, dtype: torch.dtype, rows: int, arch: str, backward: bool) -> tuple[Tiles, ...]:
    """Return the shipped tiles, those of the other form (all segments in one launch, or a launch a
    level), the former's in a launch a level, and neighbours of the shipped ones that differ in one
    size.
    """
    shipped, other = (
        tiles.choose(program, dtype, count, arch) for count in (rows, tiles.WHOLE_ROWS + (rows <= tiles.WHOLE_ROWS))
    )
    # What a CUDA graph may like best: few rows, and columns spread over many programs.
    small = tiles.choose(program, dtype, 1, arch)._replace(whole=False)
    found = [candidate.backward if backward else candidate for candidate in (shipped, other, small)]
    for name, (least, most) in LIMITS.items():
        size = getattr(found[0], name)
        sizes = (size - 1, size + 1) if name in ONE_BY_ONE else (size // 2, size * 2)
        found += [
            found[0]._replace(**{name: size}) for size in sizes if least <= size <= most and name != UNUSED[backward]
        ]
    return tuple(dict.fromkeys(found))


def _key(work: str, program: Program, mixing: bool, x: Tensor, params: Sequence[Tensor]) -> Key:
    arch = device.architecture(x.device)
    return Key(
        work=work,
        table=_digest(program.table.text),
        mixing=mixing,
        slots=x.shape[1] if x.stride(1) else 1,
        dtype=str(x.dtype).removeprefix("torch."),
        precision=bound.precision(x.dtype, arch),
        rows=tiles.power_of_two(len(x)),
        align=bound.alignment(x, device.addresses(params, x.device)[1], program),
        arch=arch,
        device=_device(x.device),
        triton=triton.__version__,
        kernels=_sources(),
    )


@functools.lru_cache(maxsize=1024)
def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@functools.cache
def _device(device: torch.device) -> str:
    """The name of a device, which tells what an architecture does not: multiprocessors, clocks."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@functools.cache
def _sources() -> str:
    return _digest("".join(path.read_text() for path in sorted(Path(__file__).parent.parent.rglob("*.py"))))


def _chosen(key: Key, program: Program, x: Tensor, run: Callable[[Tiles], object]) -> Tiles | None:
    """Return the choice of this process, or of the disk, or of the clock; None, the shipped one,
    while a CUDA graph is captured that finds none."""
    known = _CHOSEN.get(key)
    if known is not None or device.capturing(x.device):
        return known
    with _TUNING:
        if key not in _CHOSEN:
            several = candidates(program, x.dtype, key.rows, key.arch, key.work == "backward")
            _CHOSEN[key] = _read(key, several) or _timed(key, several, run)
        return _CHOSEN[key]


def _timed(key: Key, several: tuple[Tiles, ...], run: Callable[[Tiles], object]) -> Tiles:
    """Time the candidates and keep the fastest, the shipped one in front; those that do not fit the
    device are left out."""
    times: dict[Tiles, float] = {}
    for candidate in several:
        try:
            times[candidate] = milliseconds(functools.partial(run, candidate))
        except UNFIT:
            if candidate == several[0]:
                raise
    best = min(times, key=times.__getitem__)
    _write(key, best, times)
    return best


def folder() -> Path:
    """Where choices stand: FUSEDMOE_CACHE_DIR, or fusedmoe/ in the user's cache.

    Raises: RuntimeError for a user without a home.
    """
    named = os.environ.get("FUSEDMOE_CACHE_DIR")
    if named:
        return Path(named)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fusedmoe"
    except RuntimeError:
        raise RuntimeError(
            "FUSEDMOE_CACHE_DIR: expected a folder for tuned tiles, because this user has no home directory, got none"
        ) from None


def _path(key: Key) -> Path:
    return folder() / f"tiles-{_digest(json.dumps(key))}.json"


def _read(key: Key, several: tuple[Tiles, ...]) -> Tiles | None:
    """Return the choice that stands on disk, if it is one of `several`; warn of a file that holds
    anything else."""
    path = _path(key)
    try:
        found = json.loads(path.read_text())
        if found["key"] != key._asdict():
            raise ValueError(f"the key {found['key']}")
        best = Tiles(**found["tiles"])
        if best not in several:
            raise ValueError(f"{best}, which is no candidate")
        return best
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(
            f"{path}: expected tiles that an earlier run found the fastest, got {type(error).__name__}: "
            f"{error}; tuned again",
            stacklevel=2,
        )
        return None


def _write(key: Key, best: Tiles, times: dict[Tiles, float]) -> None:
    """Keep a choice for other processes, with all times for whoever wants to look; warn where that
    cannot be."""
    path = _path(key)
    tried = [{**candidate._asdict(), "milliseconds": time} for candidate, time in times.items()]
    text = json.dumps({"key": key._asdict(), "tiles": best._asdict(), "milliseconds": tried}, indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as part:
            part.write(text)
        try:
            os.replace(part.name, path)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(part.name)
            raise
    except OSError as error:
        warnings.warn(
            f"{path}: expected a file that can be written, got {error}; the tiles are kept for this process only",
            stacklevel=2,
        )
