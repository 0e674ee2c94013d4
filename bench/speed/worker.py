"""A process that runs one runtime: pools of threads of two runtimes in one process would disturb
each other.

The measuring process says what to build and when to run; between its turns a worker is stopped, so
arms of several processes take turns like those of one. (Waiting for a message would not do: a
runtime's own threads go on spinning for work, on a core that another arm needs.) Messages are
pickles over the worker's standard input and output.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from typing import BinaryIO

from torch import Tensor

from fusedmoe.speed.measuring import pin, processors, repeats_of, seconds_of
from fusedmoe.speed.runtimes import NEEDS, PROGRAMS, Absent, Job, Program, first_line


def missing(runtime: str) -> str | None:
    """Return which packages of a runtime are not installed, or None."""
    lacking = []
    for package in NEEDS[runtime]:
        try:
            version(package)
        except PackageNotFoundError:
            lacking.append(package)
    return (
        f"not installed: {', '.join(lacking)}; `pip install 'fusedmoe[bench]'` brings the runtimes" if lacking else None
    )


class Died(Absent):
    """Says how a worker's process ended."""


class Worker:
    """A running process for one runtime and one number of threads."""

    def __init__(self, runtime: str, threads: int) -> None:
        # Open as long as the process runs; `close` closes it.
        self.log = tempfile.TemporaryFile()  # noqa: SIM115
        cores = ",".join(map(str, processors()[:threads]))
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "ZENDNNL_MATMUL_WEIGHT_CACHE": "0",
            "PYTHONWARNINGS": "ignore",
        }
        command = [sys.executable, "-m", "fusedmoe.speed.worker", cores]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, env=environment
        )
        self.runtime = runtime

    def ask(self, verb: str, *payload: object) -> object:
        """Send a request and return the answer.

        Raises: Absent, with the reason, if the worker cannot or died.
        """
        try:
            self._signal("SIGCONT")
            pickle.dump((verb, payload), self.process.stdin)
            self.process.stdin.flush()
            kind, answer = pickle.load(self.process.stdout)
            self._signal("SIGSTOP")
        except (OSError, EOFError, pickle.UnpicklingError):
            self.process.wait()
            self.log.seek(0)
            said = self.log.read().decode(errors="replace").strip().splitlines()
            # Popen gives a signal as a negative status.
            code = self.process.returncode
            ended = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
            raise Died(f"its process {ended}; {said[-1][:200] if said else 'it said nothing'}") from None
        if kind == "absent":
            raise Absent(answer)
        return answer

    def _signal(self, name: str) -> None:
        """Stop the process or let it go on, where the system can."""
        if hasattr(signal, name):
            self.process.send_signal(getattr(signal, name))

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        """End the process."""
        # A worker that died has closed the pipe itself.
        with contextlib.suppress(OSError):
            self._signal("SIGCONT")
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.log.close()


class Workers:
    """The running workers, started when they are first needed."""

    def __init__(self) -> None:
        self.running: dict[tuple[str, int], Worker] = {}
        self.died: dict[tuple[str, str, str], str] = {}

    def require(self, runtime: str) -> None:
        """Raise Absent if packages of a runtime are missing."""
        reason = missing(runtime)
        if reason:
            raise Absent(reason)

    def remote(self, job: Job) -> Remote:
        """Return the arm of a job.

        Raises: Absent, with the reason, if the runtime cannot run it; one that died of its like is
            not asked again.
        """
        kind = (job.runtime, job.mode, job.dtype)
        if kind in self.died:
            raise Absent(self.died[kind])
        known = self.running.get((job.runtime, job.threads))
        if known is None or not known.alive:
            if known:
                known.close()
            known = self.running[job.runtime, job.threads] = Worker(job.runtime, job.threads)
        try:
            return Remote(known, job)
        except Died as error:
            self.died[kind] = str(error)
            raise

    def forget(self) -> None:
        """Let every worker drop what it has built."""
        for worker in self.running.values():
            if worker.alive:
                worker.ask("forget")

    def close(self) -> None:
        """End every worker."""
        for worker in self.running.values():
            worker.close()
        self.running.clear()


class Remote:
    """An arm that a worker runs."""

    def __init__(self, worker: Worker, job: Job) -> None:
        self.worker = worker
        self.key = worker.ask("build", job)

    def repeats(self) -> int:
        return self.worker.ask("repeats", self.key)

    def seconds(self, repeats: int) -> float:
        return self.worker.ask("seconds", self.key, repeats)

    def result(self) -> Tensor:
        """Run it once and return the output, or d_x of a training step, in float32."""
        return self.worker.ask("result", self.key)


def answer(built: list[Program], verb: str, payload: tuple) -> object:
    """Do what the measuring process asks for."""
    if verb == "build":
        (job,) = payload
        built.append(PROGRAMS[job.runtime](job))
        # Compilers work at the first call.
        built[-1].result()
        return len(built) - 1
    if verb == "forget":
        import torch

        built.clear()
        torch.compiler.reset()
        return None
    if verb == "result":
        return built[payload[0]].result()
    if verb == "repeats":
        return repeats_of(built[payload[0]].call)
    return seconds_of(built[payload[0]].call, payload[1])


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until the other side closes the pipe."""
    built: list[Program] = []
    while True:
        try:
            verb, payload = pickle.load(requests)
        except EOFError:
            return
        try:
            reply = ("ok", answer(built, verb, payload))
        except Absent as error:
            reply = ("absent", str(error))
        # Whatever a runtime raises is why its arm is absent.
        except Exception as error:
            reply = ("absent", first_line(error))
        pickle.dump(reply, answers)
        answers.flush()


if __name__ == "__main__":
    pin([int(core) for core in sys.argv[1].split(",")])
    # Runtimes print; the pipe is for answers alone.
    pipe = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, pipe)
