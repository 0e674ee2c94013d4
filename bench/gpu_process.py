"""Processes that are followed and, where they take too long, ended with all that they started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable

# A process that does not end when it is killed is left behind: the driver may hold it.
GRACE = 5.0


class Reader:
    """A pipe that is read as it fills, line by line."""

    def __init__(self, descriptor: int, take: Callable[[str], None]) -> None:
        self.descriptor, self.take, self.rest = descriptor, take, b""
        os.set_blocking(descriptor, False)

    def read(self) -> bool:
        """Take what is there; False at the end."""
        while True:
            try:
                chunk = os.read(self.descriptor, 1 << 16)
            except BlockingIOError:
                return True
            *lines, self.rest = (self.rest + chunk).split(b"\n")
            if not chunk and self.rest:
                lines, self.rest = [self.rest], b""
            for line in lines:
                self.take(line.decode(errors="replace"))
            if not chunk:
                return False


def kill(process: subprocess.Popen) -> None:
    """End a process and all that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
