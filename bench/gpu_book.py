"""What `make gpu` found, in one JSON file that is whole at any moment."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path


class Book:
    """A dictionary with a file: `head` says what was run on, `parts` has a record a part: status,
    seconds and the results of its cases by key."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict = {"head": {}, "parts": {}}
        if path.exists():
            self.content = json.loads(path.read_text())

    def part(self, letter: str) -> dict:
        """The record of a part, an empty one where it has none."""
        return self.content["parts"].setdefault(letter, {"status": "not run", "seconds": 0.0, "results": {}})

    def begin(self, letter: str, title: str, resume: bool) -> dict:
        """A fresh record of a part, or the one there is without the cases that did not end."""
        kept = self.part(letter)["results"] if resume else {}
        finished = {key: result for key, result in kept.items() if "error" not in result and "skipped" not in result}
        self.content["parts"][letter] = {"title": title, "status": "running", "seconds": 0.0, "results": finished}
        # In their order, also where one is run alone later.
        self.content["parts"] = dict(sorted(self.content["parts"].items()))
        return self.content["parts"][letter]

    def save(self) -> None:
        """Write the file aside and move it into place: whoever reads it, or cuts this process off,
        finds a whole one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=self.path.parent, suffix=".part", delete=False) as aside:
            json.dump(self.content, aside, indent=1)
            aside.write("\n")
        os.replace(aside.name, self.path)
