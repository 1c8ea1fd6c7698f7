"""`crosstile speed`: training and generating on this CPU beside transformers, with the same weights and tokens.

Measured in rounds in which all contestants take turns, so that what disturbs the machine disturbs all. transformers
runs SDPA, as it is and compiled; its better time is what ours is held to.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median, quantiles
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from crosstile.models import load
from crosstile.models.arrays import tree_leaves
from crosstile.models.generate import stream
from crosstile.models.learners import make_learner
from crosstile.models.packing import Batch
from crosstile.models.recipe import Optimizer, Recipe

TRAINING, DECODING = 1.0, 1.5  # the bars: transformers' time over ours
PEER = "transformers"
RATE = 1e-4


@dataclass(frozen=True)
class Sizes:
    """Of the model that is timed, and of its work.

    Attributes:
        layers, hidden, inner, heads, kv_heads, vocab: of a Llama.
        batch, seq: of a training step.
        prompt, tokens: of generating, one sequence.
    """

    layers: int = 6
    hidden: int = 512
    inner: int = 1376
    heads: int = 8
    kv_heads: int = 4
    vocab: int = 8192
    batch: int = 4
    seq: int = 256
    prompt: int = 128
    tokens: int = 64


@dataclass(frozen=True)
class Timed:
    """One contestant.

    Attributes:
        name: "transformers ..." or "crosstile ...".
        seconds: of each step of training, or of each token after the first.
        first: seconds to the first token; 0 of training.
    """

    name: str
    seconds: Sequence[float]
    first: float = 0.0

    @property
    def median(self) -> float:
        """Seconds."""
        return median(self.seconds)


class Model:
    """The same weights for all contestants."""

    def __init__(self, sizes: Sizes) -> None:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        self.sizes, self._torch = sizes, torch
        fields: dict[str, Any] = {
            "vocab_size": sizes.vocab,
            "hidden_size": sizes.hidden,
            "intermediate_size": sizes.inner,
            "num_hidden_layers": sizes.layers,
            "num_attention_heads": sizes.heads,
            "num_key_value_heads": sizes.kv_heads,
            "max_position_embeddings": 2048,
            "attn_implementation": "sdpa",
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": 0,
        }
        self._made = LlamaForCausalLM(LlamaConfig(**fields))
        self._folder = tempfile.TemporaryDirectory(prefix="crosstile-speed-")
        self._made.save_pretrained(self._folder.name)
        rng = np.random.default_rng(0)
        self.rows = rng.integers(0, sizes.vocab, (sizes.batch, sizes.seq + 1)).astype(np.int32)
        self.prompt = rng.integers(0, sizes.vocab, (1, sizes.prompt)).astype(np.int32)

    def theirs(self) -> Any:
        """A model of transformers."""
        model = type(self._made)(self._made.config)
        model.load_state_dict(self._made.state_dict())
        return model

    def ours(self, framework: str) -> tuple[Any, Any]:
        """Parameters and config."""
        return load(self._folder.name, framework)


def training(model: Model, rounds: int) -> list[Timed]:
    """A step each: loss, gradients, clipping, AdamW in float32."""
    steps = {
        f"{PEER}, eager": _their_step(model, compiled=False),
        f"{PEER}, compiled": _their_step(model, compiled=True),
        "crosstile torch": _our_step(model, "torch", compiled=False),
        "crosstile torch, compiled": _our_step(model, "torch", compiled=True),
        "crosstile jax": _our_step(model, "jax", compiled=False),
    }
    return [Timed(name, seconds) for name, seconds in _in_turns(steps, rounds).items()]


def _their_step(model: Model, compiled: bool) -> Callable[[], Any]:
    import torch

    theirs = model.theirs()
    matrices = [array for array in theirs.parameters() if array.ndim > 1]
    vectors = [array for array in theirs.parameters() if array.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), fused=True)
    forward = torch.compile(theirs) if compiled else theirs
    rows = torch.as_tensor(model.rows.astype(np.int64))
    tokens, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def step() -> float:
        loss = forward(input_ids=tokens, labels=targets, shift_labels=targets, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def _our_step(model: Model, framework: str, compiled: bool) -> Callable[[], Any]:
    params, config = model.ours(framework)
    recipe = replace(Recipe(), framework=framework, compile=compiled, optimizer=Optimizer(learning_rate=RATE))
    learner, batch = make_learner(recipe, params, config), Batch(model.rows)
    return lambda: learner.step(batch, RATE).loss


def _in_turns(steps: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step in each round; the first losses must agree, or something else is timed."""
    losses = {name: step() for name, step in steps.items()}
    if max(losses.values()) - min(losses.values()) > 1e-3:
        raise AssertionError(f"the contestants compute different losses: {losses}")
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for name in _turns(list(steps), rounds):
        began = time.perf_counter()
        steps[name]()
        seconds[name].append(time.perf_counter() - began)
    return seconds


def _turns(names: list[str], rounds: int) -> Iterator[str]:
    """All names so many times, every other time backwards."""
    for turn in range(rounds):
        yield from names if turn % 2 else reversed(names)


def decoding(model: Model, rounds: int) -> list[Timed]:
    """The likeliest tokens after a prompt, one sequence; the first token comes with reading the prompt."""
    contestants = {
        f"{PEER}, growing cache": _their_tokens(model, static=False),
        f"{PEER}, static cache, compiled": _their_tokens(model, static=True),
        "crosstile torch": _our_tokens(model, "torch", compiled=False),
        "crosstile torch, compiled": _our_tokens(model, "torch", compiled=True),
        "crosstile jax": _our_tokens(model, "jax", compiled=False),
    }
    texts = {name: [token for token, _ in tokens()] for name, tokens in contestants.items()}
    if len({tuple(text) for text in texts.values()}) != 1:
        raise AssertionError(f"the contestants generate different tokens: {texts}")
    firsts: dict[str, list[float]] = {name: [] for name in contestants}
    rests: dict[str, list[float]] = {name: [] for name in contestants}
    for name in _turns(list(contestants), rounds):
        began = time.perf_counter()
        times = [at - began for _, at in contestants[name]()]
        firsts[name].append(times[0])
        rests[name].append((times[-1] - times[0]) / (len(times) - 1))
    return [Timed(name, rests[name], median(firsts[name])) for name in contestants]


def _their_tokens(model: Model, static: bool) -> Callable[[], Iterator[tuple[int, float]]]:
    import torch
    from transformers.generation.streamers import BaseStreamer

    theirs = model.theirs().eval()
    options: dict[str, Any] = {"max_new_tokens": model.sizes.tokens, "do_sample": False}
    if static:
        theirs.forward = torch.compile(theirs.forward)
        options["cache_implementation"] = "static"
    prompt = torch.as_tensor(model.prompt.astype(np.int64))

    class Clock(BaseStreamer):  # type: ignore[misc]
        def __init__(self) -> None:
            self.tokens: list[tuple[int, float]] = []

        def put(self, value: Any) -> None:
            if value.numel() == 1:
                self.tokens.append((int(value), time.perf_counter()))

        def end(self) -> None:
            pass

    def tokens() -> Iterator[tuple[int, float]]:
        clock = Clock()
        with torch.no_grad():
            theirs.generate(prompt, streamer=clock, **options)
        return iter(clock.tokens)

    return tokens


def _our_tokens(model: Model, framework: str, compiled: bool) -> Callable[[], Iterator[tuple[int, float]]]:
    params, config = model.ours(framework)

    def tokens() -> Iterator[tuple[int, float]]:
        for column in stream(params, config, model.prompt, model.sizes.tokens, compile=compiled):
            yield int(column[0]), time.perf_counter()

    return tokens


def weight_bytes(model: Model) -> int:
    """What each token reads at least."""
    params, _ = model.ours("numpy")
    return sum(array.nbytes for name, array in tree_leaves(params).items() if name != "embedding")


def ratio(found: Sequence[Timed], ours: str = "crosstile") -> float:
    """The better time of transformers over our better one, of those whose names begin so."""
    theirs = min(one.median for one in found if one.name.startswith(PEER))
    return theirs / min(one.median for one in found if one.name.startswith(ours))


def show(title: str, found: Sequence[Timed], bar: float, unit: int, moved: int, console: Console) -> bool:
    """The table, with token/s of `unit` tokens a time and, where weights are read, GB/s; whether the bar is held."""
    table = Table(title=title, box=None, title_justify="left")
    for heading in ("", "ms", "quartiles", "token/s", *(("ms to the first", "GB/s") if moved else ())):
        table.add_column(heading, justify="right" if heading else "left")
    for one in found:
        low, _, high = (part * 1e3 for part in quantiles(one.seconds, n=4))
        cells = [one.name, f"{one.median * 1e3:.2f}", f"{low:.2f} … {high:.2f}", f"{unit / one.median:,.0f}"]
        table.add_row(*cells, *((f"{one.first * 1e3:.1f}", f"{moved / one.median / 1e9:.2f}") if moved else ()))
    console.print(table)
    reached = ratio(found)
    colour = "green" if reached >= bar else "red"
    frameworks = [name for name in ("torch", "jax") if any(one.name.startswith(f"crosstile {name}") for one in found)]
    each = ", ".join(f"{name} {ratio(found, f'crosstile {name}'):.2f}" for name in frameworks)
    console.print(f"transformers' better time over ours: [{colour}]{reached:.2f}[/], bar ≥ {bar} ({each})")
    console.print("measured on this CPU", style="dim")
    return reached >= bar
