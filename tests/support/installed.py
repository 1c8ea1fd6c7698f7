"""What a test needs that is not installed everywhere."""

from importlib.util import find_spec

import pytest

needs_jax_triton = pytest.mark.skipif(find_spec("jax_triton") is None, reason="jax-triton lowers for CUDA")
