"""Sphinx: the Markdown pages of this folder, and the reference out of the docstrings.

`make docs` builds build/docs.
"""

from __future__ import annotations

import re

import fusedmoe

project, version = "fusedmoe", fusedmoe.__version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "myst_parser"]
html_theme = "furo"
html_title = f"fusedmoe {version}"
# napoleon reads `Args:` and the like. A name stands in single backticks, and is a link where the
# reference has it.
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Source"]
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 80
myst_heading_anchors = 3

# A section that stands on one line with its text, and what reStructuredText calls it.
FIELDS = {"Args": "Arguments", "Returns": "returns", "Raises": "raises", "Source": "Source"}
SECTION = re.compile(rf"({'|'.join(FIELDS)}):( .+)?")

# A size alone, as in `num_tasks: T.`, would begin a list from T on.
LETTER = re.compile(r"(?<=: )[A-Za-z](?=\.( |$))")
# What may be a link.
NAME = re.compile(r"[A-Za-z_][\w.]*")


def fields(lines: list[str]) -> list[str]:
    """Return the lines with sections of the form `Returns: [B, H].` as fields, which napoleon
    leaves alone.
    """
    result: list[str] = []
    inside = False
    for line in lines:
        section = SECTION.fullmatch(line)
        if section and section[2]:
            result += ["", f":{FIELDS[section[1]]}:{section[2]}"]
            inside = True
        elif section or not line:
            result += ["", line] if section else [line]
            inside = False
        else:
            result.append(f"    {line.strip()}" if inside else line)
    return result


def literal(lines: list[str]) -> list[str]:
    """Return the lines with every indented block behind an empty line marked as literal: formulas
    and programs.
    """
    result: list[str] = []
    above = ""
    for line in lines:
        begins = line.startswith("    ") and bool(result) and not result[-1]
        if begins and above and not above.startswith((" ", ":")) and not SECTION.fullmatch(above):
            result += ["::", ""]
        result.append(line)
        above = line or above
    return result


def plain(lines: list[str]) -> list[str]:
    """Return the lines with stars and bars as they stand.

    What is in backticks and no dotted name becomes literal.
    """
    result: list[str] = []
    block = False
    for line in lines:
        block = line == "::" or (block and (not line or line.startswith("    ")))
        parts = line.split("`")
        if block or len(parts) % 2 == 0:
            result.append(line)
            continue
        prose = [LETTER.sub(r"\\\g<0>", re.sub(r"[*|]", r"\\\g<0>", part)) for part in parts[::2]]
        names = [f"`{part}`" if NAME.fullmatch(part) else f"``{part}``" for part in parts[1::2]]
        result.append("".join(a + b for a, b in zip(prose, [*names, ""], strict=True)))
    return result


def setup(app) -> None:
    """Rewrite docstrings before napoleon reads them, and links to pages outside this folder before
    MyST does.
    """

    def rewrite(app, what, name, given, options, lines) -> None:
        lines[:] = fields(plain(literal(lines)))

    def relink(app, page, source) -> None:
        source[0] = re.sub(r"\]\(\.\./README\.md(#\w+)?\)", "](index.rst)", source[0])
        source[0] = re.sub(r"\]\((\.\./[\w./-]+\.md)\)", r"](path:\1)", source[0])

    app.connect("autodoc-process-docstring", rewrite, priority=400)
    app.connect("source-read", relink)
