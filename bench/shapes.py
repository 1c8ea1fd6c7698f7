"""Named shapes of real models, shared by the compile check, the tests and the benchmarks.

Sizes are those of the models' public `config.json`. A new op adds the shapes of one subclass of `Shape`.
"""

from __future__ import annotations

from .attention_shapes import ATTENTION, FEATURES
from .cross_entropy_shapes import CROSS_ENTROPY
from .glu_shapes import GLU
from .grouped_shapes import GROUPED
from .matmul_shapes import MATMUL
from .norm_shapes import NORM
from .paged_shapes import PAGED
from .quantized_shapes import QUANTIZED
from .rotary_shapes import ROTARY
from .shape import Shape

SHAPES: tuple[Shape, ...] = (
    *ATTENTION, *MATMUL, *GLU, *GROUPED, *QUANTIZED, *NORM, *ROTARY, *CROSS_ENTROPY, *FEATURES, *PAGED,
)  # fmt: skip

OPS = tuple(dict.fromkeys(shape.op for shape in SHAPES))
QUICK = (
    "llama-3-8b", "gpt-oss-20b", "llama-3-8b-paged", "llama-3-8b-down", "llama-3-8b-glu",
    "llama-3-8b-norm", "qwen3-30b-a3b-down",
    "llama-3-8b-gate-int4",
    "llama-3-8b-rotary", "llama-3-8b-head",
)  # fmt: skip


def get_shape(name: str) -> Shape:
    """The shape of that name; `llama-3-8b@q_len=1024,kv_len=1024` is that shape with other sizes.

    Raises ValueError with the names there are.
    """
    base, _, sizes = name.partition("@")
    for shape in SHAPES:
        if shape.name == base:
            return shape.resized(_sizes(sizes)) if sizes else shape
    raise ValueError(f"shape: got {name!r}; it must be one of {', '.join(shape.name for shape in SHAPES)}")


def _sizes(text: str) -> dict[str, int]:
    found = {}
    for item in text.split(","):
        name, equals, value = item.partition("=")
        if not equals or not value.isdigit():
            raise ValueError(f"shape: got {item!r} after @; it must be SIZE=NUMBER")
        found[name] = int(value)
    return found
