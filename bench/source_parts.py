"""Some functions of a Python file, without the rest of it.

A tutorial runs its benchmark when it is imported, and a module of a server imports the server. Here only those
statements of the file are run that the named functions need, by the names that their byte code reads.
"""

from __future__ import annotations

import ast
import dis
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import CodeType
from typing import Any

_READS = {"LOAD_NAME", "LOAD_GLOBAL"}
_BINDS = {"STORE_NAME", "STORE_GLOBAL"}


def load_parts(path: Path, names: Iterable[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """The namespace in which the named functions live; names in `given` are taken from there, not from the file.

    Raises ValueError where neither binds a name that is asked for.
    """
    namespace: dict[str, Any] = {"__name__": path.stem, "__file__": str(path)}
    wanted, statements = set(names), _statements(path)
    bound = set(given).union(*(binds for _, binds, _ in statements))
    if wanted - bound:
        raise ValueError(f"names: {path} has no {', '.join(sorted(wanted - bound))}; it must bind every name asked for")
    needed: set[int] = set()
    while True:
        more = {place for place, (_, binds, _) in enumerate(statements) if binds & (wanted - set(given))} - needed
        if not more:
            break
        needed |= more
        wanted = wanted.union(*(statements[place][2] for place in more))
    for place in sorted(needed):
        namespace.update(given)
        exec(statements[place][0], namespace)
    return namespace


def _statements(path: Path) -> list[tuple[CodeType, set[str], set[str]]]:
    """Every statement of the file: its code, the names it binds in the file, and the names it reads from there."""
    found = []
    for statement in ast.parse(path.read_text(), str(path)).body:
        code = compile(ast.Module([statement], []), str(path), "exec", dont_inherit=True)
        binds = {item.argval for item in dis.get_instructions(code) if item.opname in _BINDS}
        reads = {item.argval for part in _nested(code) for item in dis.get_instructions(part) if item.opname in _READS}
        found.append((code, binds, reads))
    return found


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)
