"""Reading GPU machine code: what NVIDIA's SASS and AMD's assembly say about a kernel."""

from __future__ import annotations

import re
import struct
from collections import Counter
from dataclasses import dataclass, field

# HMMA: mma.sync (sm_80); HGMMA: wgmma (sm_90); UTCHMMA and kin: tcgen05 (sm_100); IMMA, QGMMA, ...: other dtypes.
_NVIDIA_MATRIX = re.compile(r"^(?:HMMA|IMMA|DMMA|QMMA|HGMMA|IGMMA|QGMMA|UTC\w*MMA)$")
_AMD_INSTRUCTION = re.compile(r"^\t((?:v|s|ds|buffer|global|flat|scratch)_\w+)", re.M)
_REGISTER_COUNT = 0x2F  # the EIATTR codes of .nv.info
_FRAME_SIZE = 0x11


@dataclass(frozen=True)
class MachineCode:
    """Counts read from one kernel's machine code; the fields are those of `KernelFacts`."""

    instructions: int
    matrix: dict[str, int]
    registers: int
    spills: int
    local_bytes: int
    notes: dict[str, int] = field(default_factory=dict)


def read_sass(sass: str, cubin: bytes = b"") -> MachineCode:
    """From the disassembly that Triton returns, where a line is the control word, a tab and the instruction."""
    instructions = [line.split("\t", 1)[1] for line in sass.splitlines() if "\t" in line]
    names = Counter(_opcode(text) for text in instructions)
    info = _cubin_attributes(cubin)
    highest = max(map(int, re.findall(r"\bR(\d+)\b", "\n".join(instructions))), default=-1)
    return MachineCode(
        instructions=len(instructions),
        matrix={name: count for name, count in names.items() if _NVIDIA_MATRIX.match(name)},
        registers=info.get(_REGISTER_COUNT, 1 + highest),
        spills=names["LDL"] + names["STL"],
        local_bytes=info.get(_FRAME_SIZE, 0),
        notes={
            "tma": sum(count for name, count in names.items() if name.startswith("UTMA")),
            "async_copies": names["LDGSTS"],
        },
    )


def _opcode(text: str) -> str:
    """`@!P0 HMMA.16816.F32 R4, ...;` -> `HMMA`."""
    words = text.split()
    if words and words[0].startswith("@"):
        words = words[1:]
    return words[0].rstrip(";").split(".")[0] if words else ""


def _cubin_attributes(cubin: bytes) -> dict[int, int]:
    """The largest register count and frame size that the cubin's `.nv.info` section states."""
    found: dict[int, int] = {}
    for body in _elf_sections(cubin, ".nv.info"):
        at = 0
        while at + 4 <= len(body):  # format, attribute, then a size (format 4) or a value
            form, attribute, size = struct.unpack_from("<BBH", body, at)
            payload = body[at + 4 : at + 4 + size] if form == 4 else b""
            if attribute in (_REGISTER_COUNT, _FRAME_SIZE) and len(payload) >= 8:
                _symbol, value = struct.unpack_from("<II", payload)
                found[attribute] = max(value, found.get(attribute, 0))
            at += 4 + len(payload)
    return found


def _elf_sections(elf: bytes, name: str) -> list[bytes]:
    """The contents of the sections of exactly that name in a 64-bit little-endian ELF file."""
    if elf[:4] != b"\x7fELF":
        return []
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    entry, count, names_at = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + entry * index) for index in range(count)]
    strings = headers[names_at][4]
    found = []
    for header in headers:
        start = strings + header[0]
        if elf[start : elf.index(b"\0", start)].decode() == name:
            found.append(elf[header[4] : header[4] + header[5]])
    return found


def read_amdgcn(text: str) -> MachineCode:
    """From the assembly that Triton returns, whose metadata at the end states registers and spills."""
    names = Counter(_AMD_INSTRUCTION.findall(text))
    return MachineCode(
        instructions=sum(names.values()),
        matrix={name: count for name, count in names.items() if name.startswith(("v_mfma", "v_smfmac"))},
        registers=_metadata(text, "vgpr_count"),
        spills=_metadata(text, "vgpr_spill_count") + _metadata(text, "sgpr_spill_count"),
        local_bytes=_metadata(text, "private_segment_fixed_size"),
        notes={
            "accumulation_registers": _metadata(text, "agpr_count"),
            "scalar_registers": _metadata(text, "sgpr_count"),
            "scalar_register_spills": _metadata(text, "sgpr_spill_count"),
        },
    )


def _metadata(text: str, name: str) -> int:
    found = re.search(rf"^\s*(?:- )?\.{name}:\s+(\d+)", text, re.M)
    return int(found.group(1)) if found else 0
