"""Text as token ids and back: by the files of a checkpoint, or as bytes where it has none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import data

FILES = ("tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json", "spiece.model")
UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a decoder makes of a character that lacks bytes


@dataclass(frozen=True)
class Tokenizer:
    """How a model's texts are written in numbers.

    Attributes:
        name: "bytes", or the file it came from.
        encode: the ids, int32 `[length]`, with those that begin a text where the tokenizer adds them.
        decode: the text of a list or array of ids, those that only control left out.
    """

    name: str
    encode: Callable[[str], np.ndarray]
    decode: Callable[[Any], str]

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of ids piece by piece as they come, a character only when it is whole.

        >>> "|".join(BYTES.stream("déf".encode()))
        'd|é|f'
        """
        known: list[int] = []
        start = read = 0  # the text up to `read` is out; decoding begins at `start`, for what spans two tokens
        for number in ids:
            known.append(int(number))
            before, now = self.decode(known[start:read]), self.decode(known[start:])
            if len(now) > len(before) and not now.endswith(UNFINISHED):
                yield now[len(before) :]
                start, read = read, len(known)
        rest = self.decode(known[start:])[len(self.decode(known[start:read])) :]
        if rest:
            yield rest


BYTES = Tokenizer("bytes", data.encode, data.decode)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint: `tokenizer.json`, older files through transformers, or bytes without any.

    Raises:
        ImportError: the folder has such files, and the library that reads them is missing.
    """
    folder = Path(folder)
    file = folder / "tokenizer.json"
    if file.is_file():
        try:
            from tokenizers import Tokenizer as Backend
        except ImportError:
            raise ImportError(f"{file}: tokenizers reads it, and is not here: pip install tokenizers") from None
        backend = Backend.from_file(str(file))
        return Tokenizer(file.name, lambda text: _ids(backend.encode(text).ids), lambda ids: backend.decode(list(ids)))
    found = [name for name in FILES if (folder / name).is_file()]
    if not found:
        return BYTES
    from transformers import AutoTokenizer

    older = AutoTokenizer.from_pretrained(folder)
    return Tokenizer(
        found[0],
        lambda text: _ids(older.encode(text)),
        lambda ids: str(older.decode(list(ids), skip_special_tokens=True)),
    )


def _ids(ids: Any) -> np.ndarray:
    return np.array(ids, np.int32)
