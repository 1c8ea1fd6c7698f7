"""Tiles that a search found, in small tables an op and chip, and which of them a call gets.

An op that has tables declares in its `tiles.py` what they know a call by: `kinds_of(spec)`, names and values that match
exactly or not at all, and `sizes_of(spec, inputs)`, a NamedTuple of sizes, of which the nearest is taken, and of bools,
which match exactly. It may also say which tiles can be: `fits(spec, target, config, sizes)`.

Sizes are rounded to powers of two, and a distance is the sum of the octaves between them. An entry that is more than
`FARTHEST` octaves away in one size says nothing of the call: then the op's own `choose_config(spec, target, sizes)`
chooses.
A user's own table, of what was measured on the machine, goes before the package's where both are as near.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from .targets import Target

FARTHEST = 3  # octaves in one size


@dataclass(frozen=True)
class Entry:
    """What a search found for one call on one chip.

    Attributes:
        kinds: of the call, by name.
        sizes: of the call, rounded to powers of two, and bools.
        tiles: fields of the configuration; a field of a part is `part.field`. Others stay as the heuristic has them.
        heuristic: microseconds of the heuristic's tiles by direction; None where they were refused.
        tuned: microseconds of these.
        by: "predicted", or "measured" on a chip.
        source: the named shape that was compiled.
    """

    kinds: dict[str, Any]
    sizes: dict[str, Any]
    tiles: dict[str, int]
    heuristic: dict[str, float | None]
    tuned: dict[str, float | None]
    by: str
    source: str

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells two entries apart, in the order in which a table has them."""
        return tuple((name, str(value)) for name, value in self.kinds.items()), tuple(self.sizes.items())


class Chosen(NamedTuple):
    """A configuration, and in words where it comes from."""

    config: Any
    origin: str


def bucket(size: int) -> int:
    """The nearest power of two, by its logarithm.

    >>> [bucket(size) for size in (0, 1, 3, 5, 1000, 14336)]
    [1, 1, 4, 4, 1024, 16384]
    """
    if size < 2:
        return 1
    below = 1 << size.bit_length() - 1
    return below if size * size < 2 * below * below else 2 * below


def bucketed(sizes: Any) -> Any:
    """The sizes rounded, and bools as they are."""
    return type(sizes)(*(size if size is True or size is False else _bucket(size) for size in sizes))


_bucket = lru_cache(maxsize=1 << 16)(bucket)


@lru_cache(maxsize=4096)
def choose(op: str, declared: ModuleType, spec: Any, target: Target, sizes: Any) -> Chosen:
    """The tiles of a call: from the nearest entry of the tables, else from the op's heuristic.

    `declared` is the op's `tiles.py`, and `sizes` are those of the arrays; None where they are not known.
    """
    heuristic = declared.choose_config(spec, target, *(() if sizes is None else (sizes,)))
    if target.interpreted:
        return Chosen(heuristic, "small ones, for the interpreter")
    if sizes is None:
        return Chosen(heuristic, "the heuristic")
    kinds, rounded = declared.kinds_of(spec), bucketed(sizes)._asdict()
    near = [
        (octaves, place, entry, where)
        for place, (where, entries) in enumerate(tables(op, target.name))
        for entry in entries
        if (octaves := distance(entry, kinds, rounded)) is not None
    ]
    for octaves, _, entry, where in sorted(near, key=lambda item: item[:2]):
        config = applied(declared, spec, target, heuristic, entry.tiles, sizes)
        if config is not None:
            how = "its own entry" if octaves == 0 else f"the nearest entry, {octaves} octaves away"
            return Chosen(config, f"{where} for {target.name}: {how}, {entry.by} for {entry.source}")
    return Chosen(heuristic, f"the heuristic: no table for {target.name} has a call like this")


def applied(declared: ModuleType, spec: Any, target: Target, config: Any, tiles: Mapping[str, int], sizes: Any) -> Any:
    """The configuration with these tiles; None where it has no such fields, or the op says that they do not fit."""
    try:
        changed = changed_tiles(config, tiles)
    except ValueError:
        return None
    fits = getattr(declared, "fits", None)
    return changed if fits is None or fits(spec, target, changed, sizes) else None


def distance(entry: Entry, kinds: Mapping[str, Any], sizes: Mapping[str, Any]) -> int | None:
    """How many octaves lie between an entry and a call, in all sizes together; None where it says nothing of it."""
    if entry.kinds != kinds or entry.sizes.keys() != sizes.keys():
        return None
    total = 0
    for name, size in sizes.items():
        known = entry.sizes[name]
        if isinstance(size, bool) or isinstance(known, bool):
            if size is not known:
                return None
            continue
        octaves = abs(size.bit_length() - known.bit_length())
        if octaves > FARTHEST:
            return None
        total += octaves
    return total


def changed_tiles(config: Any, tiles: Mapping[str, int]) -> Any:
    """The configuration with other values in some fields; `forward.block_q` is a field of its part `forward`.

    Raises ValueError where there is no such field.
    """
    for name, value in tiles.items():
        head, _, rest = name.partition(".")
        names = [item.name for item in fields(config)]
        if head not in names or bool(rest) != is_dataclass(getattr(config, head)):
            inside = [f"{at}.*" if is_dataclass(getattr(config, at)) else at for at in names]
            raise ValueError(f"config: got {name!r}; it must be one of {', '.join(inside)}")
        inner = changed_tiles(getattr(config, head), {rest: value}) if rest else value
        config = replace(config, **{head: inner})
    return config


def user_folder() -> Path:
    """Where a user's own results lie: `CROSSTILE_CACHE`, else the `crosstile` folder of the user's cache."""
    if given := os.environ.get("CROSSTILE_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crosstile"


def package_table(op: str, chip: str) -> Path:
    """The file of an op's table that the package brings."""
    return Path(__file__).parent.parent / op / "tuned" / f"{chip}.json"


def user_table(op: str, chip: str) -> Path:
    """The file of a user's own table of an op."""
    return user_folder() / "tuned" / op / f"{chip}.json"


@lru_cache(maxsize=256)
def tables(op: str, chip: str) -> tuple[tuple[str, tuple[Entry, ...]], ...]:
    """The user's table and the package's, each with its name in words; read once."""
    return (
        ("your own table", read_table(user_table(op, chip), strict=False)),
        ("the tuned table", read_table(package_table(op, chip))),
    )


def forget() -> None:
    """Read the tables again when they are next asked for."""
    tables.cache_clear()
    choose.cache_clear()


def read_table(file: Path, strict: bool = True) -> tuple[Entry, ...]:
    """The entries of a table; () where there is none, or (not strict) where it cannot be read."""
    import json

    try:
        document = json.loads(file.read_text())
        return tuple(Entry(**entry) for entry in document["entries"])
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, KeyError, TypeError):
        if strict:
            raise
        return ()


def write_table(file: Path, op: str, chip: str, entries: Sequence[Entry]) -> None:
    """Write a table, an entry a line, sorted by kinds and sizes, so that a change shows as the lines that changed."""
    import json
    from dataclasses import asdict

    lines = ",\n  ".join(json.dumps(asdict(entry)) for entry in sorted(entries, key=lambda entry: entry.key))
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text(f'{{\n "op": "{op}",\n "chip": "{chip}",\n "entries": [\n  {lines}\n ]\n}}\n')
    partial.replace(file)
