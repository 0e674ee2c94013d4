"""Mutation testing: one operation of a source file is changed, and a named test must fail.

What to change is written as the field writes a rewrite rule. In a pattern `$name` stands for one
identifier, the same one wherever the name comes again, so that a renaming breaks no rule; white
space stands for any, and a comma may end a list; all else stands for itself.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
_TOKEN = re.compile(r"\$\w+|\w+|[^\w\s]")


@cache
def compiled(pattern: str) -> re.Pattern[str]:
    """The regular expression that finds a pattern."""
    seen: set[str] = set()
    parts: list[str] = []
    previous = ""
    for token in _TOKEN.findall(pattern):
        # Two words stay apart, and nothing else needs a space.
        parts.append(
            r"\s+" if parts and previous[-1:].isalnum() and re.match(r"[\w$]", token) else r"\s*" if parts else ""
        )
        name = token[1:]
        if token in ")]":
            # A formatter that breaks a list into lines ends the last one with a comma.
            parts.append(r"(?:,\s*)?" + re.escape(token))
        elif not token.startswith("$"):
            parts.append(re.escape(token))
        elif name in seen:
            parts.append(f"(?P={name})")
        else:
            seen.add(name)
            parts.append(rf"(?P<{name}>[A-Za-z_]\w*)")
        previous = token
    begins, ends = (r"\b" if re.match(r"[\w$]", token) else "" for token in (pattern.lstrip()[0], previous[-1]))
    return re.compile(begins + "".join(parts) + ends)


def places(source: str, pattern: str) -> int:
    """In how many places of a source a pattern is found."""
    return len(compiled(pattern).findall(source))


def mutated(source: str, pattern: str, instead: str) -> str:
    """The source with `instead`, in which `$name` is what it stood for, in the one place of the
    pattern. Raises: ValueError unless there is one."""
    if (count := places(source, pattern)) != 1:
        raise ValueError(f"mutation: expected one place of {pattern!r}, got {count}")
    return compiled(pattern).sub(lambda found: re.sub(r"\$(\w+)", lambda name: found[name[1]], instead), source)


def names_a_test(node: str) -> bool:
    """Whether a file of the tests has the function that a node id names."""
    path, _, name = node.partition("::")
    function = name.partition("[")[0]
    return (ROOT / path).is_file() and f"def {function}(" in (ROOT / path).read_text()
