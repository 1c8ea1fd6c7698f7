"""Generation with a cache of keys and values, for NumPy, torch and JAX.

The next token is chosen from the logits by NumPy in every framework, so that equal logits give equal tokens at any
temperature. In JAX two programs serve all lengths: the prompt is padded to a power of two, and the decoding step takes
its position as data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
from typing import Any

import numpy as np

import crosstile

from .arrays import Array, Tree, framework_of, like, to_numpy
from .config import Config
from .transformer import extend, make_cache

_Run = Callable[..., tuple[Array, Tree]]  # `extend` of params, tokens, cache, position and `only`


def generate(
    params: Tree,
    config: Config,
    prompt: Any,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    compile: bool = False,
) -> Array:
    """Continue a prompt.

    Args:
        params: of any framework and dtype; the framework of the result.
        config: the model's.
        prompt: int `[batch, length]` or `[length]`, in any framework or a list; length at least 1.
        max_new_tokens: how many tokens to append.
        temperature: 0 takes the likeliest token (the lowest id of equals), else tokens are drawn from
            `softmax(logits / temperature)`.
        seed: of the drawing; the same seed draws the same tokens.
        compile: whether torch compiles the step that appends a token, once for all lengths; JAX always does.

    Returns:
        int32 `[batch, length + max_new_tokens]`, or without `batch` as the prompt was.

    Raises:
        ValueError: an empty prompt, ids outside of the vocabulary, or more tokens than `config.max_seq_len`.
    """
    tokens = np.asarray(prompt if isinstance(prompt, list | tuple) else to_numpy(prompt))
    _check(tokens, config, max_new_tokens, temperature)
    rows = tokens.astype(np.int32).reshape(-1, tokens.shape[-1])
    new = list(stream(params, config, rows, max_new_tokens, temperature, seed, compile))
    whole = np.concatenate([rows, *(column[:, None] for column in new)], axis=1)
    return like(whole.reshape(*tokens.shape[:-1], -1), params["embedding"])


def stream(
    params: Tree,
    config: Config,
    prompt: np.ndarray,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    compile: bool = False,
) -> Iterator[np.ndarray]:
    """The new tokens of `generate`, int32 `[batch]` at a time; prompt int32 `[batch, length]`."""
    if not max_new_tokens:
        return
    rng = np.random.default_rng(seed)
    tokens, end = prompt, prompt.shape[1] + max_new_tokens
    runners: dict[bool, _Run] = {}
    with _inference(params):
        logits, cache = _read(params, config, tokens, end)
        while True:
            chosen = choose(to_numpy(logits), temperature, rng)
            yield chosen
            position = tokens.shape[1]
            tokens = np.concatenate([tokens, chosen[:, None]], axis=1)
            if tokens.shape[1] == end:
                return
            long = config.is_long(position + 1)
            if long != config.is_long(position):  # the keys so far were turned by other frequencies
                logits, cache = _read(params, config, tokens, end)
                continue
            step = like(chosen[:, None], params["embedding"])
            run = runners[long] = runners.get(long) or _runner(params, config, long, compile)
            out, cache = run(params, step, cache, position)
            logits = out[:, 0]


def _read(params: Tree, config: Config, tokens: np.ndarray, end: int) -> tuple[Array, Tree]:
    """The logits after the last of the tokens, `[batch, vocab]`, and a cache of them with place for `end`."""
    batch, length = tokens.shape
    in_jax = framework_of(params["embedding"]) == "jax"
    padded = min(_power_of_two(length), config.max_seq_len) if in_jax else length
    cache = make_cache(params, config, batch, _power_of_two(max(padded, end)))
    # Padding is written behind the tokens; each step overwrites its slot before any query sees it.
    whole = like(np.pad(tokens, ((0, 0), (0, padded - length))), params["embedding"])
    logits, cache = _runner(params, config, config.is_long(length))(params, whole, cache, 0, length - 1)
    return logits[:, 0], cache


def choose(logits: np.ndarray, temperature: float, rng: np.random.Generator) -> np.ndarray:
    """One token a row of logits `[batch, vocab]`: the largest, or a draw by adding Gumbel noise to them."""
    if temperature:
        logits = logits.astype(np.float64) / temperature + rng.gumbel(size=logits.shape)
    return logits.argmax(axis=-1).astype(np.int32)


def _runner(params: Tree, config: Config, long: bool, compile: bool = False) -> _Run:
    """`extend` of that config, compiled in JAX, and in torch where that is asked for."""
    embedding = params["embedding"]
    framework = framework_of(embedding)
    if framework != "jax" and not (compile and framework == "torch"):
        return partial(_extend, config, long)
    choice = crosstile.explain("matmul", embedding[:1], embedding[:1].T).choice
    surroundings = (choice.implementation, choice.target.name)
    if framework == "jax":
        return _compiled(config, long, surroundings)
    return _checked_once(_compiled_in_torch(config, long, surroundings))


def _extend(
    config: Config, long: bool, params: Tree, tokens: Array, cache: Tree, position: Any, only: Any = None
) -> tuple[Array, Tree]:
    return extend(params, tokens, config, cache, position, long, only)


@lru_cache(maxsize=8)
def _compiled(config: Config, long: bool, _surroundings: tuple[str | None, str]) -> _Run:
    """One for each config and for each implementation and target, which a traced program has baked in."""
    import jax

    def run(params: Tree, tokens: Array, cache: Tree, position: Any, only: Any = None) -> tuple[Array, Tree]:
        return _extend(config, long, params, tokens, cache, 0 if tokens.shape[1] > 1 else position, only)

    return jax.jit(run, donate_argnums=2)


@lru_cache(maxsize=8)
def _compiled_in_torch(config: Config, long: bool, _surroundings: tuple[str | None, str]) -> _Run:
    """The same; the position is a number that the program does not know, so that one serves all lengths."""
    import torch

    return torch.compile(partial(_extend, config, long), dynamic=True)  # type: ignore[no-any-return]


def _checked_once(compiled: _Run) -> _Run:
    """The same for one text, in which nothing but the position changes: so what was compiled fits, if it did once.

    torch looks at every parameter again in each call otherwise, a twentieth of a small model's step.
    """
    import torch

    known = False

    def run(params: Tree, tokens: Array, cache: Tree, position: Any) -> tuple[Array, Tree]:
        nonlocal known
        with torch.compiler.set_stance("default", skip_guard_eval_unsafe=known):
            found = compiled(params, tokens, cache, position)
        known = True
        return found

    return run


def _inference(params: Tree) -> AbstractContextManager[Any]:
    if framework_of(params["embedding"]) != "torch":
        return nullcontext()
    import torch

    return torch.no_grad()


def _power_of_two(length: int) -> int:
    return max(32, 1 << (length - 1).bit_length())


def _check(tokens: np.ndarray, config: Config, max_new_tokens: int, temperature: float) -> None:
    if tokens.ndim not in (1, 2) or not tokens.shape[-1] or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"prompt: got {tokens.dtype} {list(tokens.shape)}; it must be int [length] or [batch, length], length >= 1"
        )
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < config.vocab_size:
        raise ValueError(
            f"prompt: ids go from {tokens.min()} to {tokens.max()}; they must be 0 to {config.vocab_size - 1}"
        )
    if max_new_tokens < 0 or tokens.shape[-1] + max_new_tokens > config.max_seq_len:
        raise ValueError(
            f"max_new_tokens: got {max_new_tokens} after a prompt of {tokens.shape[-1]}; together they must be at most "
            f"max_seq_len, {config.max_seq_len}"
        )
    if temperature < 0:
        raise ValueError(f"temperature: got {temperature}; it must not be negative")
