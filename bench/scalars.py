"""Scalar instructions of a TPU program as Python source: `S` are the scalar registers, `P` the predicates, `W` SMEM.

Registers hold 32-bit words without sign. What an instruction reads are the values before its bundle; what it writes
shows after it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from .bundles import Instruction, register_of

MASK = 0xFFFFFFFF
SIGN = 0x80000000

# Addresses. Allocations lie 2**18 words apart above bit 27, operands 2**21 units apart. A copy takes addresses of VMEM,
# and before v6e of HBM, shifted by 4: bit 31 tells a shifted address from one as it stands.
_BASE, _ALLOCATION_BITS, _OPERAND_BITS = 1 << 27, 18, 21
_OPERATORS = {"sadd.s32": "+", "ssub.s32": "-", "smul.u32": "*", "sand.u32": "&", "sor.u32": "|", "sxor.u32": "^"}
_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_PREDICATES = {"por": "{} or {}", "pand": "{} and {}", "pnand": "not ({} and {})", "pxor": "{} != {}"}
UNKNOWN = ("spop", "vpop.sfrf", "smax.f32", "smin.f32", "smul.f32", "sadd.f32", "ssub.f32", "scvt", "sc.u32", "srdreg")
_INDEX = re.compile(r"index: (\d+)")


class ScalarError(RuntimeError):
    """An instruction that control depends on is not known here."""


@dataclass
class Names:
    """The addresses given to allocations, by name."""

    found: dict[str, int] = field(default_factory=dict)

    def address(self, name: str) -> int:
        """The allocation's first word; a new one where the name is new."""
        return self.found.setdefault(name, _BASE + (len(self.found) << _ALLOCATION_BITS))


def operand_at(address: int) -> tuple[int, int]:
    """The number of the operand that a copy reads, and the granule in it at which the copy begins."""
    bits = _OPERAND_BITS + 4 if address & SIGN else _OPERAND_BITS
    base = SIGN if address & SIGN else _BASE
    return (address - base) >> bits, address & ((1 << bits) - 1)


def smem_word(address: int) -> int:
    """The word of SMEM that a copy writes first."""
    return address >> 4 if address & SIGN else address


def assignment(instruction: Instruction, names: Names) -> tuple[str, str]:
    """What a scalar instruction writes, and the expression for it; its guard is part of the expression."""
    target = read(instruction.writes, names)
    value = _expression(instruction, names)
    if instruction.guard:
        value = f"({value}) if {read(instruction.guard, names)} else {target}"
    return target, value


def store(instruction: Instruction, names: Names) -> str:
    """The statement of a store to SMEM."""
    place, _, value = " ".join(instruction.operands).rpartition(" ")
    line = f"W[{read(place.rstrip(','), names)}] = {read(value, names)}"
    return f"if {read(instruction.guard, names)}: {line}" if instruction.guard else line


def read(operand: str, names: Names) -> str:
    """The expression for an operand: a register, a number, an address."""
    if operand.startswith("[") and not operand.endswith("]"):
        operand = operand[operand.rindex("]") + 1 :].strip()  # what precedes says whether an address is known
    if not operand.startswith("["):
        operand = operand.split()[0]  # what follows names the allocation that an address points into
    if operand.startswith(("%", "!")):
        if operand[1:].isdigit():
            return f"W[-{operand[1:]}]"  # a result that waits in a queue of the divider
        register = register_of(operand)
        if operand[operand.index("%") + 1] == "s":
            return f"S[{register}]"
        return f"(not P[{register}])" if operand.startswith("!") else f"P[{register}]"
    if operand.startswith("["):
        inside = operand[1 : operand.rindex("]")].removeprefix("smem:")
        if inside.startswith("["):
            return read(inside, names)
        return "(" + " + ".join(_term(part.strip(), names) for part in inside.split("+")) + f") & {MASK}"
    return _term(operand, names)


def _term(part: str, names: Names) -> str:
    if part.startswith("%"):
        return read(part, names)
    if part.startswith("#allocation"):
        return str(names.address(part))
    try:
        return str(int(part.removeprefix("$"), 0) & MASK)
    except ValueError:
        float(part)  # a float: nothing counts with it
        return "0"


def _expression(instruction: Instruction, names: Names) -> str:
    op, operands = instruction.op, instruction.operands
    if op in UNKNOWN:
        return "R.ask()"
    if op.startswith("inlined_call_operand"):
        index = _INDEX.search(" ".join(operands))
        number = int(index.group(1)) if index else 0
        return f"D.scalar({number})" if "no memory" in op else str(_BASE + (number << _OPERAND_BITS))
    if op == "sld":
        return f"W[{read(operands[0], names)}]"
    if len(operands) == 2 and operands[0].startswith("(") and op in ("smov", "pmov"):
        which, old = operands[0][1:-1].split(", ")
        return f"({read(operands[1], names)}) if {read(which, names)} else {read(old, names)}"
    values = [read(operand, names) for operand in operands if operand]
    rule = _rule(op)
    if rule is None:
        raise ScalarError(f"control depends on the instruction {op!r}, which the machine does not know")
    return rule(values)


def _rule(op: str) -> Callable[[list[str]], str] | None:
    """How an instruction's expression is put together from those of its operands."""
    kind = op.split(".")
    if op in _OPERATORS:
        return lambda v: f"(({v[0]}) {_OPERATORS[op]} ({v[1]})) & {MASK}"
    if kind[0] == "scalar_lea":
        return lambda v: f"(({v[0]}) + ({v[1]})) & {MASK}"
    if kind[0] in ("smov", "pmov", "int_to_ptr", "scalar_parameter_address", "reloc"):
        return lambda v: v[0]
    if kind[0] == "scmp" and kind[2] in ("s32", "u32"):
        flip = f" ^ {SIGN}" if kind[2] == "s32" and kind[1] not in ("eq", "ne") else ""
        return lambda v: f"(({v[0]}){flip}) {_COMPARISONS[kind[1]]} (({v[1]}){flip})"
    if kind[0] == "scmp":
        return lambda v: "bool(R.ask())"
    if op in _PREDICATES:
        return lambda v: _PREDICATES[op].format(*v)
    return _RARE.get(op)


_RARE: dict[str, Callable[[list[str]], str]] = {
    "pneg": lambda v: f"not {v[0]}",
    "scalar_select": lambda v: f"({v[1]}) if {v[0]} else ({v[2]})",
    "sshll.u32": lambda v: f"(({v[0]}) << (({v[1]}) & 31)) & {MASK}",
    "sshrl.u32": lambda v: f"({v[0]}) >> (({v[1]}) & 31)",
    "sshra.s32": lambda v: f"(((({v[0]}) ^ {SIGN}) - {SIGN}) >> (({v[1]}) & 31)) & {MASK}",
    "smulhi.u32": lambda v: f"(({v[0]}) * ({v[1]})) >> 32",
    "smin.u32": lambda v: f"min({v[0]}, {v[1]})",
    "smax.u32": lambda v: f"max({v[0]}, {v[1]})",
    "sdivrem.u32": lambda v: f"({v[0]}) // (({v[1]}) or 1)",
    "sdivrem.rem.u32": lambda v: f"({v[0]}) % (({v[1]}) or 1)",
    "spop.drf": lambda v: v[0],
    "sclz": lambda v: f"32 - ({v[0]}).bit_length()",
}
