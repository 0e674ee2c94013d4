"""The command line: `python -m fusedmoe demo | bench | doctor`, each with its own `--help`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "demo": ("fusedmoe.demo.command", "train one multi-task model twice, plain and fused, and compare"),
    "bench": ("fusedmoe.speed.command", "time the fused layers against everything a user could pick instead"),
    "doctor": (
        "fusedmoe.doctor",
        "print CPU, instruction sets, compilers, GPU, and why each backend is or is not available",
    ),
}
USAGE = "usage: python -m fusedmoe COMMAND [--help]\n\n" + "\n".join(
    f"  {name:8}{what}" for name, (_, what) in COMMANDS.items()
)
# What the commands need beyond the library; `pip install 'fusedmoe[demo]'` brings them.
EXTRAS = ("rich", "matplotlib")


def main(arguments: Sequence[str]) -> int:
    """Run one command; return the exit status: 2 for an unknown command or a missing package."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    if arguments[0] not in COMMANDS:
        print(f"command: expected one of {', '.join(COMMANDS)}, got {arguments[0]!r}\n\n{USAGE}", file=sys.stderr)
        return 2
    try:
        command = importlib.import_module(COMMANDS[arguments[0]][0])
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in EXTRAS:
            raise
        print(
            f"{arguments[0]}: needs the package {package}, which this Python does not have; run `pip install "
            f"{' '.join(EXTRAS)}`.",
            file=sys.stderr,
        )
        return 2
    return command.main(arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
