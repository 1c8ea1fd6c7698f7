"""Bad input is refused before any kernel runs; the message names the argument, what it was and what it must be."""

import numpy as np
import pytest

import crosstile

torch = pytest.importorskip("torch")
jnp = pytest.importorskip("jax.numpy")

MAKERS = {
    "numpy": lambda *shape, dtype="float32": np.zeros(shape, dtype),
    "torch": lambda *shape, dtype="float32": torch.zeros(shape, dtype=getattr(torch, dtype)),
    "jax": lambda *shape, dtype="float32": jnp.zeros(shape, dtype),
}


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4)), {}, r"q: got rank 3, \[2, 3, 4\]; it must have rank 4"),
        (((1, 2, 3, 4), (1, 2, 3, 4), (2, 3)), {}, r"v: got rank 2"),
        (((1, 2, 4, 8), (1, 2, 3, 8), (1, 2, 3, 8)), {}, r"k: kv_heads is 3, which does not divide q_heads 4"),
        (((2, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8)), {}, r"k: batch is 1 .*; it must be 2"),
        (((1, 2, 4, 8), (1, 2, 4, 8), (3, 2, 4, 8)), {}, r"v: batch is 3 .*; it must be 1"),
        (((1, 2, 4, 8), (1, 2, 4, 6), (1, 2, 4, 8)), {}, r"k: head_dim is 6 .*; it must be 8"),
        (((1, 2, 4, 8), (1, 5, 4, 8), (1, 6, 4, 8)), {}, r"v: got \[1, 6, 4, 8\]; its length and heads"),
        (((1, 2, 4, 0), (1, 5, 4, 0), (1, 5, 4, 8)), {}, r"q: the last dimension is 0"),
        (((1, 2, 4, 8),) * 3, {"scale": float("nan")}, r"scale: got nan; it must be finite"),
    ],
)
def test_attention_shapes(make, shapes, options, message):
    with pytest.raises(ValueError, match=message):
        crosstile.attention(*(make(*shape) for shape in shapes), **options)


@pytest.mark.parametrize(
    ("a", "b", "options", "message"),
    [
        ((3,), (3, 4), {}, r"a: got rank 1, \[3\]; it must be \[..., m, k\]"),
        ((2, 3), (3,), {}, r"b: got rank 1"),
        ((2, 3), (4, 5), {}, r"b: k is 4 in \[4, 5\]; it must be 3"),
        ((2, 3), (3, 5), {"activation": "swish"}, r"activation: got 'swish'; it must be None or one of relu, gelu"),
        ((2, 3), (3, 5), {"bias": (4,)}, r"bias: got \[4\]; it must be \[n\] = \[5\]"),
        ((2, 3), (3, 5), {"residual": (3, 5)}, r"residual: \[3, 5\] does not broadcast with \[2, 5\]"),
        ((2, 3), (3, 5), {"residual": (7, 2, 5)}, r"residual: got \[7, 2, 5\]; it must broadcast to the result"),
        ((2, 2, 3), (5, 3, 5), {}, r"b: \[5\] does not broadcast with \[2\]"),
        ((2, 3), (3, 5), {"out_dtype": "int8"}, r"out_dtype: got 'int8'; it must be one of float32"),
    ],
)
def test_matmul_shapes(make, a, b, options, message):
    arrays = {name: make(*value) if isinstance(value, tuple) else value for name, value in options.items()}
    with pytest.raises(ValueError, match=message):
        crosstile.matmul(make(*a), make(*b), **arrays)


def test_integers_are_refused(make):
    with pytest.raises(TypeError, match=r"q: dtype is int32; it must be one of float32"):
        crosstile.attention(*(make(1, 2, 3, 4, dtype="int32") for _ in "qkv"))
    with pytest.raises(TypeError, match=r"a: dtype is int32"):
        crosstile.matmul(make(2, 3, dtype="int32"), make(3, 4, dtype="int32"))


def test_mixed_dtypes_are_refused(make):
    with pytest.raises(TypeError, match=r"v: dtype is float16; it must be float32, as q is: convert"):
        crosstile.attention(make(1, 2, 3, 4), make(1, 2, 3, 4), make(1, 2, 3, 4, dtype="float16"))
    with pytest.raises(TypeError, match=r"bias: dtype is float16; it must be float32"):
        crosstile.matmul(make(2, 3), make(3, 4), bias=make(4, dtype="float16"))


@pytest.mark.parametrize(("first", "second"), [("torch", "numpy"), ("torch", "jax"), ("jax", "numpy")])
def test_mixed_frameworks_are_refused(first, second):
    x, y = MAKERS[first](2, 3), MAKERS[second](3, 4)
    with pytest.raises(TypeError, match=r"b: (got .* where a is|dtype is)"):
        crosstile.matmul(x, y)
    with pytest.raises(TypeError, match=r"b: (got .* where a is|dtype is)"):
        crosstile.matmul(y.T, x.T)


def test_things_that_are_no_arrays_are_refused():
    with pytest.raises(TypeError, match=r"q: got list; it must be a numpy.ndarray, torch.Tensor or jax.Array"):
        crosstile.attention([[1.0]], [[1.0]], [[1.0]])
    with pytest.raises(TypeError, match=r"b: got list"):
        crosstile.matmul(np.zeros((2, 3)), [[1.0]])


def test_a_scale_that_is_no_number_is_refused(make):
    with pytest.raises(TypeError, match=r"scale: got str; it must be a number or None"):
        crosstile.attention(*(make(1, 2, 3, 4) for _ in "qkv"), scale="big")


def test_errors_come_at_trace_time_too():
    import jax

    with pytest.raises(ValueError, match=r"k: kv_heads is 3"):
        jax.jit(crosstile.attention).trace(*(jnp.zeros(s) for s in ((1, 2, 4, 8), (1, 2, 3, 8), (1, 2, 3, 8))))
