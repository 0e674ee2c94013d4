"""Who used each place of a buffer, and since which barrier: what nothing but luck would order on a
device."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# A stamp is the turn (barriers passed, over all blocks of the launch) and the warp; the last number
# of a warp stands for several of them.
WARPS = 64
SEVERAL = WARPS - 1
# Bytes of a place: the smallest numbers that kernels store.
PLACE = 2


class Now(NamedTuple):
    """The turn that runs, and the first one of the block that it belongs to."""

    turn: int = 1
    block: int = 1


class Trace:
    """The last warp that wrote each place of a range in this launch, and those that read it in that
    turn."""

    def __init__(self, first: int, end: int):
        self.first = first
        self.writer, self.reader = (np.zeros(-(-(end - first) // PLACE), np.int64) for _ in range(2))

    def read(self, at: np.ndarray, size: int, warps: np.ndarray, now: Now) -> str | None:
        """Note a read of `size` bytes by the lanes of `warps` at their addresses; return what is
        wrong with it, or None."""
        places, mine = self._stamped(at, size, warps, now)
        fault = self._clash(self.writer[places], mine, now, "reads what")
        before = self.reader[places]
        several = (before // WARPS == now.turn) & (before != mine)
        self.reader[places] = np.where(several, now.turn * WARPS + SEVERAL, mine)
        # Lanes of other warps have just written their stamps to the same place.
        other = ~several & (self.reader[places] != mine)
        self.reader[places[other]] = now.turn * WARPS + SEVERAL
        return fault

    def write(self, at: np.ndarray, size: int, warps: np.ndarray, now: Now) -> str | None:
        """As `read`, for a write."""
        places, mine = self._stamped(at, size, warps, now)
        fault = self._clash(self.writer[places], mine, now, "writes where")
        before = self.reader[places]
        if ((before // WARPS == now.turn) & (before != mine)).any():
            fault = fault or "a warp writes what another one has read since the last barrier"
        self.writer[places] = mine
        if (self.writer[places] != mine).any():
            fault = fault or "several warps write to one place at once"
        return fault

    def _stamped(self, at: np.ndarray, size: int, warps: np.ndarray, now: Now) -> tuple[np.ndarray, np.ndarray]:
        places = (at.view(np.int64) - self.first) // PLACE + np.arange(-(-size // PLACE))[:, None]
        return places.ravel(), np.broadcast_to(now.turn * WARPS + warps.astype(np.int64), places.shape).ravel()

    @staticmethod
    def _clash(written: np.ndarray, mine: np.ndarray, now: Now, does: str) -> str | None:
        turns = written // WARPS
        if ((turns == now.turn) & (written != mine)).any():
            return f"a warp {does} another one has written since the last barrier"
        if ((turns > 0) & (turns < now.block)).any():
            return f"a block {does} another block of the launch has written"
        return None
