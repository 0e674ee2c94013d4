"""The text of a PTX module as data: parameters, registers, instructions, labels. Grammar: NVIDIA's
PTX ISA, as far as Triton writes it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple


class PtxError(Exception):
    """A text that cannot be read, or an instruction that the executor does not know."""


class Instruction(NamedTuple):
    """One instruction: `opcode` is "ld.global.v4.b32", `guard` the predicate that lets it run, or a
    false one if `negated`."""

    opcode: str
    operands: tuple[str, ...]
    guard: str | None
    negated: bool

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.opcode.split("."))

    def __str__(self) -> str:
        guard = f"@{'!' * self.negated}{self.guard} " if self.guard else ""
        return f"{guard}{self.opcode} {', '.join(self.operands)}".strip()


@dataclass(frozen=True)
class Kernel:
    """One .entry: `parameters` are (type, name), `registers` have their bits (1: a predicate),
    `labels` the instruction that they stand before, `tables` the labels that an indexed branch
    chooses from.
    """

    name: str
    parameters: tuple[tuple[str, str], ...]
    threads: int
    registers: dict[str, int]
    instructions: list[Instruction]
    labels: dict[str, int]
    tables: dict[str, tuple[str, ...]]


PARAMETER = re.compile(r"\.param\s+\.(\w+)\b[^,)]*?(\w+)\s*(?=[,)])")
DECLARATION = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.DOTALL)
INSTRUCTION = re.compile(r"(?:@(!?)(%?\w+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
# A label, a brace of a scope (a vector's brace never begins a statement), or anything up to a
# semicolon.
STATEMENT = re.compile(r"\s*(?:([$\w]+)\s*:(?!:)|([{}])|([^;]+);)")
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s{\[][^,]*")
FLOAT = re.compile(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}")
INTEGER = re.compile(r"-?\d+U?|-?0[xX][0-9a-fA-F]+U?")


def parse(text: str) -> Kernel:
    """Return the one kernel of a module.

    Raises: PtxError unless there is exactly one, and for a statement that cannot be read.
    """
    # Line tables and comments end with their line.
    text = re.sub(r"//[^\n]*|^\s*\.(?:loc|file)\b[^\n]*", "", text, flags=re.MULTILINE)
    entries = [found.start() for found in re.finditer(r"\.entry\b", text)]
    if len(entries) != 1:
        raise PtxError(f"module: expected one .entry, got {len(entries)}")
    head, body = text[entries[0] :].split("{", 1)
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)(?:\s*,\s*1)*\s*(?:$|\.)", head)
    if threads is None:
        raise PtxError("kernel: expected .reqntid of one dimension, got none")
    name = re.match(r"\.entry\s+([\w$]+)", head)[1]
    kernel = Kernel(name, tuple(PARAMETER.findall(head)), int(threads[1]), {}, [], {}, {})
    _read(body, kernel)
    return kernel


def _read(body: str, kernel: Kernel) -> None:
    """Add what stands in a body to the kernel; inner scopes (inline assembly) are dissolved into
    it."""
    label = None
    at, depth = 0, 1
    while depth:
        found = STATEMENT.match(body, at)
        if found is None:
            raise PtxError(f"body: expected a statement, got {body[at : at + 80].strip()!r}")
        at = found.end()
        name, brace, statement = found.groups()
        if name:
            kernel.labels[name] = len(kernel.instructions)
            label = name
        elif brace:
            depth += 1 if brace == "{" else -1
        elif statement.startswith(".reg"):
            _declare(statement, kernel.registers)
        elif statement.startswith(".branchtargets"):
            # The label before it names the table, and no place.
            del kernel.labels[label]
            kernel.tables[label] = tuple(
                target.strip() for target in statement.removeprefix(".branchtargets").split(",")
            )
        elif not statement.startswith(".pragma"):
            kernel.instructions.append(_instruction(statement))


def _declare(statement: str, registers: dict[str, int]) -> None:
    kind, names = DECLARATION.match(statement).groups()
    bits = 1 if kind == "pred" else int(re.sub(r"\D", "", kind))
    for name in names.split(","):
        name = name.strip()
        many = re.fullmatch(r"(.+)<(\d+)>", name)
        for register in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]:
            # A scope may declare a name again; as one of the same size it may share the register.
            if registers.setdefault(register, bits) != bits:
                raise PtxError(
                    f"{register}: expected one size in all scopes, got {registers[register]} and {bits} bits"
                )


def _instruction(statement: str) -> Instruction:
    found = INSTRUCTION.fullmatch(statement.strip())
    if found is None:
        raise PtxError(f"body: expected an instruction, got {statement.strip()[:80]!r}")
    negation, guard, opcode, operands = found.groups()
    return Instruction(opcode, tuple(operand.strip() for operand in OPERAND.findall(operands)), guard, negation == "!")


def elements(operand: str) -> tuple[str, ...]:
    """The registers of a vector operand "{a, b}", or the one operand."""
    return tuple(name.strip() for name in operand.strip("{} ").split(","))


def address(operand: str) -> tuple[str, int]:
    """(base, offset in bytes) of "[base + offset]"."""
    found = re.fullmatch(r"\[\s*([%$\w]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand)
    if found is None:
        raise PtxError(f"operand: expected [base + offset], got {operand}")
    return found[1], integer(found[2] or "0")


def integer(literal: str) -> int:
    """The value of "12", "-1", "0x3FU"."""
    if not INTEGER.fullmatch(literal):
        raise PtxError(f"operand: expected an integer, got {literal!r}")
    return int(literal.rstrip("U"), 0)


def pattern(literal: str, bits: int) -> int:
    """The bits of a literal: an integer, or a float as hexadecimal (0f3F800000,
    0d3FF0000000000000)."""
    value = int(literal[2:], 16) if FLOAT.fullmatch(literal) else integer(literal)
    return value & ((1 << bits) - 1)
