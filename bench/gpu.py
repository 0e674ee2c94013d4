"""`make gpu`: everything that ten minutes on a device can show, part by part, each in a process of
its own with a time limit.

    python bench/gpu.py [--part b] [--json bench/results/gpu.json] [--resume]

What a case found is in the JSON file as soon as it is there, and what processes print in the log
beside it. A case that crashes, hangs or loses the device costs itself alone: its part starts again
behind it. This process imports neither torch nor fusedmoe, and never asks the network.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import gpu_build
import gpu_warm
from gpu_book import Book
from gpu_parts import LOST, PARTS, TIMED, Part, patience
from gpu_process import Reader, kill

FOLDER = Path(__file__).parent


class Run:
    """A part under way: its record, its log, and the case that its process is at."""

    def __init__(self, letter: str, part: Part, book: Book, log: TextIO, resume: bool) -> None:
        self.letter, self.part, self.book, self.log = letter, part, book, log
        self.record = book.begin(letter, part.title, resume)
        self.seconds, self.case_seconds = (patience() * seconds for seconds in (part.seconds, part.case_seconds))
        self.began = time.monotonic()
        self.case: str | None = None
        self.case_began = self.began
        self.skipped: str | None = None

    def say(self, line: str) -> None:
        print(line, file=self.log, flush=True)
        print(line, flush=True)

    def event(self, line: str) -> None:
        """Take a line of the process about its cases: which begins, what one found, or why all are
        left out."""
        found = json.loads(line)
        if "begin" in found:
            self.case, self.case_began = found["begin"], time.monotonic()
        elif "skip" in found:
            self.skipped = found["skip"]
        else:
            self.keep(found["key"], found["result"])

    def keep(self, key: str, result: dict) -> None:
        self.record["results"][key] = result | {"took": round(time.monotonic() - self.case_began, 1)}
        self.record["seconds"] = round(time.monotonic() - self.began, 1)
        self.case = None
        self.book.save()
        self.say(f"[{self.letter}] {key}: {json.dumps(self.record['results'][key])[:400]}")

    def left(self) -> float:
        """Seconds until the part's limit, or that of its case."""
        now = time.monotonic()
        part = self.began + self.seconds - now
        return min(part, self.case_began + self.case_seconds - now) if self.case else part

    def over(self) -> bool:
        return time.monotonic() >= self.began + self.seconds


def one_process(run: Run, command: Sequence[str], environment: dict[str, str]) -> str:
    """Start a process of a part and follow it to its end; return how it ended: "done", "lost",
    "limit", or what it died of."""
    reads, writes = os.pipe()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        pass_fds=(writes,),
        env=environment | {"GPU_EVENTS": str(writes)},
        start_new_session=True,
    )
    os.close(writes)
    readers = [Reader(process.stdout.fileno(), run.say), Reader(reads, run.event)]
    try:
        with selectors.DefaultSelector() as selector:
            for reader in readers:
                selector.register(reader.descriptor, selectors.EVENT_READ, reader)
            # Processes that it started may hold the pipes open: its own end counts.
            while process.poll() is None and run.left() > 0:
                for key, _ in selector.select(min(0.2, max(0.0, run.left()))):
                    if not key.data.read():
                        selector.unregister(key.fd)
        limit = process.poll() is None
    finally:
        kill(process)
    for reader in readers:
        reader.read()
    os.close(reads)
    process.stdout.close()
    if limit:
        return "limit"
    status = process.returncode
    if status < 0:
        return f"the process died of {signal.Signals(-status).name}"
    return {0: "done", LOST: "lost"}.get(status, f"the process ended with status {status}")


def run_part(run: Run, environment: dict[str, str]) -> str:
    """Run a part to its end, or to its limit; return its status."""
    command = [sys.executable, str(FOLDER / "gpu_cases.py"), run.part.module, run.letter, str(run.book.path)]
    while True:
        before = len(run.record["results"])
        ended = one_process(run, command, environment)
        if run.skipped:
            return f"skipped: {run.skipped}"
        if run.case and ended == "limit":
            run.keep(
                run.case,
                {"error": "cut off at the part's end" if run.over() else f"no answer in {run.case_seconds:g} s"},
            )
        elif run.case:
            run.keep(run.case, {"error": ended})
        if run.over():
            return f"cut off after {run.seconds:g} s"
        if ended == "done":
            return "done"
        if len(run.record["results"]) == before:
            return f"failed: {ended}, before any case"


def failed(result: dict) -> bool:
    """Whether a case, or an arm of it, ended in an error."""
    return "error" in result or any("error" in arm for arm in result.get("arms", {}).values())


def run_parts(
    letters: Sequence[str],
    book: Book,
    log: TextIO,
    environment: dict[str, str],
    resume: bool,
    beside: Sequence[subprocess.Popen] = (),
) -> bool:
    """Run parts one after another, the first ones with other processes beside them; return whether
    all of their cases ended well."""
    well = True
    for letter in letters:
        if letter in TIMED:
            for process in beside:
                kill(process)
        run = Run(letter, PARTS[letter], book, log, resume)
        run.say(f"[{letter}] {run.part.title}, at most {run.seconds:g} s")
        book.save()
        run.record["status"] = run_part(run, environment)
        run.record["seconds"] = round(time.monotonic() - run.began, 1)
        book.save()
        faults = [key for key, result in run.record["results"].items() if failed(result)]
        run.say(
            f"[{letter}] {run.record['status']}, {run.record['seconds']} s; {len(run.record['results'])} "
            f"cases, {len(faults)} failed"
        )
        well &= run.record["status"] == "done" and not faults
    return well


def main() -> int:
    """Build what is needed, run the parts, and return 0 if all went well."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=list(PARTS), help="one part alone (default: all)")
    parser.add_argument(
        "--json",
        type=Path,
        default=Path("bench/results/gpu.json"),
        help="where results go; the log stands beside it (default: %(default)s)",
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep what the JSON has of a part's cases, and run the others"
    )
    options = parser.parse_args()
    # Whoever ends this process ends what it started: the part under way is killed on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    book = Book(options.json)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    with options.json.with_suffix(".log").open("a") as log:
        try:
            head, environment = gpu_build.prepare(log)
        except gpu_build.Missing as error:
            print(f"gpu: {error}", file=log)
            print(f"gpu: {error}", file=sys.stderr)
            return 1
        book.content["head"] = head
        if options.part:
            return 0 if run_parts([options.part], book, log, environment, options.resume) else 1
        beside = gpu_warm.start(environment, head["device"]["compute_mode"])
        try:
            return 0 if run_parts(list(PARTS), book, log, environment, options.resume, beside) else 1
        finally:
            for process in beside:
                kill(process)


if __name__ == "__main__":
    sys.exit(main())
