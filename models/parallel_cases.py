"""Small models for checks on many devices, and how far such a model may be from the one on one device."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from .config import Config, Experts, Latent, Layer
from .sharding import Parallel

ROUNDINGS = 8  # of the precision, which an error may have beside twice that of one device
SMALL = Config(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    layers=(Layer(), Layer(window=5)),
    max_seq_len=64,
)
MIXTRAL = replace(SMALL, layers=(Layer(experts=True),) * 2, experts=Experts(4, 2, 24, loss=0.1))
SHARED = replace(
    MIXTRAL,
    experts=Experts(4, 2, 24, shared_size=16, shared_gate=True, score="sigmoid", correction=True, scale=2.0, loss=0.1),
)
GPT_OSS = replace(
    SMALL,
    layers=(Layer(experts=True), Layer(window=5, experts=True)),
    experts=Experts(4, 2, 24, bias=True, router_bias=True, gate="clamped"),
    sinks=True,
    qkv_bias=True,
    out_bias=True,
)
DEEPSEEK = replace(
    SMALL, latent=Latent(q_rank=12, kv_rank=16, nope_dim=4, rope_dim=4, v_dim=6), num_kv_heads=4, layers=(Layer(),) * 2
)
GEMMA = replace(
    SMALL,
    softcap=20.0,
    logit_softcap=30.0,
    post_norm=True,
    zero_centered_norms=True,
    embedding_scale=4.0,
    tie_embeddings=True,
    qk_norm="head",
)


def layers(config: Config, count: int) -> Config:
    """The same with that many layers, alike or in turn."""
    return replace(config, layers=(config.layers * count)[:count])


@dataclass(frozen=True)
class Row:
    """One form of a model on many devices, and what it is checked with.

    Attributes:
        name: of the row.
        parallel: the axes.
        config: of the model.
        batch: rows of the batch.
        seq: tokens of a row.
        segments: whether a row holds several documents.
        remat, balanced: as in `distributed_jax.train_step` and `distributed_torch.shard`.
        precision: in which the model computes.
        implementation: of the ops; None is the choice by device.
    """

    name: str
    parallel: Parallel
    config: Config = field(default=SMALL, repr=False)
    batch: int = 8
    seq: int = 16
    segments: bool = False
    remat: str = "none"
    precision: str = "float32"
    balanced: bool | None = None
    implementation: str | None = None


def batch_of(row: Row) -> tuple[np.ndarray, np.ndarray | None]:
    """Random tokens int32 `[batch, seq + 1]`, and the segments if a row holds several documents, one with padding."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, row.config.vocab_size, (row.batch, row.seq + 1)).astype(np.int32)
    if not row.segments:
        return tokens, None
    ends = rng.integers(2, row.seq // 2, (row.batch, 2)).cumsum(1)
    segments = 1 + (np.arange(row.seq + 1)[None, :, None] >= ends[:, None]).sum(-1)
    segments[0, -3:] = 0  # padding
    return tokens, segments.astype(np.int32)


def chosen(rows: Sequence[Row], words: Sequence[str]) -> list[Row]:
    """The rows that have one of the words, or all without words. Exits with 2 where there is none."""
    found = [row for row in rows if not words or any(word in row.name for word in words)]
    if not found:
        print(f"no row has one of {', '.join(words)}; they are {', '.join(row.name for row in rows)}", file=sys.stderr)
        sys.exit(2)
    return found


@dataclass(frozen=True)
class Error:
    """How far something is from float64: on many devices, on one, and how far it may be."""

    many: float
    one: float
    allowed: float

    @property
    def passes(self) -> bool:
        """Whether it is near enough; NaN is not."""
        return self.many <= self.allowed


def error(many: float, one: float, rounding: float) -> Error:
    """By the two-times rule."""
    return Error(many, one, 2 * one + ROUNDINGS * rounding)


@dataclass(frozen=True)
class Outcome:
    """What a row showed: the error of each of "loss", "gradients" and "stepped"."""

    row: str
    errors: dict[str, Error]

    @property
    def passes(self) -> bool:
        """Whether all of it does."""
        return all(error.passes for error in self.errors.values())


def show(outcomes: Sequence[Outcome], devices: int) -> int:
    """Print them as a table, of each the error over that of one device; 1 if one fails, else 0."""
    from rich.console import Console
    from rich.table import Table

    table = Table("form", "loss", "gradients", "a step", title=f"error on {devices} devices / on one, against float64")
    for outcome in outcomes:
        cells = [
            f"[{'green' if error.passes else 'red'}]{error.many:.1e} / {error.one:.1e}[/]"
            for error in outcome.errors.values()
        ]
        table.add_row(outcome.row, *cells)
    Console(width=120).print(table)
    red = [outcome.row for outcome in outcomes if not outcome.passes]
    print(f"{len(outcomes) - len(red)} of {len(outcomes)} rows pass" + (f"; not: {', '.join(red)}" if red else ""))
    return 1 if red else 0
