"""Tables of TOML as frozen dataclasses: every key is known, every value has its field's type, or an error names it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text in quotes",
    dict: "a table",
}


def read(kind: type[T], table: Mapping[str, Any], where: str = "") -> T:
    """`kind`, a dataclass, with the values of the table; a key that is absent has its default.

    Args:
        kind: its fields are bool, int, float, str, dict, tuples of these, other dataclasses, or any of them or None.
        table: as `tomllib` gives it.
        where: the table's name, for the errors.

    Raises:
        ValueError: a key that is none of the fields, a value of another type, or a field without a value.
    """
    hints, names = get_type_hints(kind), [one.name for one in fields(kind)]  # type: ignore[arg-type]
    for name in table:
        if name not in names:
            near = get_close_matches(name, names, 1)
            meant = f"; the nearest is {near[0]}" if near else ""
            raise ValueError(f"{_path(where, name)}: there is no such key{meant}; the keys are {', '.join(names)}")
    values = {name: _value(hints[name], value, _path(where, name)) for name, value in table.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{where or 'the table'}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{where}.{error}" if where else str(error)) from None


def _path(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _value(hint: Any, value: Any, path: str) -> Any:
    if get_origin(hint) in (Union, UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not type(None)]
        if len(kinds) > 1:
            raise ValueError(f"{path}: it cannot be said here; give a config.json of Hugging Face that says it")
        return _value(kinds[0], value, path)
    if get_origin(hint) is tuple:
        return _tuple(get_args(hint), value, path)
    if is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ValueError(f"{path}: got {value!r}; it must be a table")
        return read(hint, value, path)  # type: ignore[arg-type]
    plain = get_origin(hint) or hint
    if plain is float and type(value) is int:
        return float(value)
    if type(value) is not plain:
        raise ValueError(f"{path}: got {value!r}; it must be {_WORDS[plain]}")
    return value


def _tuple(kinds: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    count = None if kinds[-1] is ... else len(kinds)
    if not isinstance(value, list) or (count is not None and len(value) != count):
        wanted = "a list" if count is None else f"a list of {count}"
        raise ValueError(f"{path}: got {value!r}; it must be {wanted}")
    return tuple(_value(kinds[0], one, f"{path}[{index}]") for index, one in enumerate(value))
