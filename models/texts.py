"""Files of text as a corpus of tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from .data import Corpus, is_held_out
from .tokenizer import BYTES, Tokenizer

SUFFIXES = (".txt", ".md", ".py", ".jsonl")


def read_texts(
    sources: Sequence[str], tokenizer: Tokenizer, vocab_size: int, *, end: int | None, field: str, held_out: int
) -> Corpus:
    """The documents of files and folders, each with the token `end` after it; tokens are kept in memory.

    Args:
        sources: files and folders, which are searched for files that end in one of `SUFFIXES`.
        tokenizer: makes tokens of a text.
        vocab_size: of the model.
        end: the token after each document; None is none.
        field: of a line of .jsonl, which holds its text.
        held_out: one document in so many is kept to measure on, chosen by its name; of a single one its last part.

    Raises:
        ValueError: a source that is not there, or of another kind; a line without the field; no text; a token that the
            model does not have.
    """
    kind = np.min_scalar_type(vocab_size - 1)
    parts: dict[bool, list[np.ndarray]] = {True: [], False: []}
    bytes_held_out = 0
    for name, text in documents(sources, field):
        kept = is_held_out(name, held_out)
        ids = tokenizer.encode(text)
        ids = ids if end is None else np.append(ids, end)
        if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
            raise ValueError(
                f"data.tokenizer: {tokenizer.name} gives token {ids.max()} in {name}; the model has {vocab_size}"
            )
        parts[kept].append(ids.astype(kind))
        bytes_held_out += (len(text.encode()) + (end is not None)) * kept
    if not parts[True] or not parts[False]:
        return _cut_last([*parts[False], *parts[True]], held_out, tokenizer)
    tokens = sum(map(len, parts[True]))
    return _corpus(parts[False], parts[True], tokenizer, bytes_held_out / max(1, tokens))


def documents(sources: Sequence[str], field: str) -> Iterator[tuple[str, str]]:
    """(name, text) of each, in the order of the sources and of the names in them."""
    for source in sources:
        root = Path(source)
        for path in _files(root):
            name = path.relative_to(root).as_posix() if root.is_dir() else path.name
            try:
                text = path.read_text("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"data.sources: {path} is not UTF-8: {error}") from None
            if path.suffix == ".jsonl":
                for number, line in enumerate(text.splitlines(), 1):
                    if line.strip():
                        yield f"{name}:{number}", _text_of(line, field, f"{path}, line {number}")
            else:
                yield name, text


def _files(root: Path) -> list[Path]:
    if root.is_dir():
        found = sorted(path for path in root.rglob("*") if path.suffix in SUFFIXES and path.is_file())
        if not found:
            raise ValueError(f"data.sources: {root} holds no file that ends in {', '.join(SUFFIXES)}")
        return found
    if not root.is_file():
        raise ValueError(f"data.sources: there is no file or folder {root}")
    if root.suffix not in SUFFIXES:
        raise ValueError(f"data.sources: got {root}; it must end in {', '.join(SUFFIXES)}, or be a folder")
    return [root]


def _text_of(line: str, field: str, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"data.sources: {where} is not JSON: {error}") from None
    text = record.get(field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        has = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"data.field: {where} has no text {field!r}; it has {has}")
    return text


def _cut_last(parts: list[np.ndarray], held_out: int, tokenizer: Tokenizer) -> Corpus:
    """Where a class of documents is empty: the last document's last part is what is measured on."""
    *before, last = parts or [np.zeros(0, np.uint8)]
    middle = len(last) - len(last) // held_out
    return _corpus([*before, last[:middle]], [last[middle:]], tokenizer, None)


def _corpus(
    train: list[np.ndarray],
    held_out: list[np.ndarray],
    tokenizer: Tokenizer,
    bytes_per_token: float | None,
) -> Corpus:
    whole = [np.concatenate(part) for part in (train, held_out)]
    if min(map(len, whole)) < 2:
        raise ValueError(
            f"data.sources: {len(whole[0])} tokens to train on and {len(whole[1])} to measure on; there must be more"
        )
    if bytes_per_token is None:
        text = tokenizer.decode(whole[1])
        bytes_per_token = 1.0 if tokenizer is BYTES else len(text.encode()) / len(whole[1])
    lengths = [np.array([len(one) for one in part]) for part in (train, held_out)]
    digest = hashlib.sha256(tokenizer.name.encode())
    for array in (*whole, *lengths):
        digest.update(np.ascontiguousarray(array).tobytes())
    return Corpus(whole[0], whole[1], digest.hexdigest(), lengths[0], lengths[1], bytes_per_token)
