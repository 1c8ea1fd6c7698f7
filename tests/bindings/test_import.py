"""`import crosstile` costs nothing that the call does not need."""

import statistics
import subprocess
import sys


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_import_brings_no_framework():
    run("import crosstile, sys; assert not {'torch', 'jax', 'triton', 'numpy'} & set(sys.modules)")


def test_import_is_quick():
    code = "import time; t = time.perf_counter(); import crosstile; print(time.perf_counter() - t)"
    run(code)
    assert statistics.median(float(run(code)) for _ in range(5)) < 0.15


def test_numpy_needs_no_framework():
    run(
        "import crosstile, numpy, sys; x = numpy.ones((1, 2, 1, 4)); crosstile.attention(x, x, x);"
        "assert not {'torch', 'jax', 'triton'} & set(sys.modules)"
    )


def test_torch_alone_brings_no_jax():
    run(
        "import crosstile, torch, sys; x = torch.ones(1, 2, 1, 4); crosstile.attention(x, x, x);"
        "assert not {'jax', 'triton'} & set(sys.modules)"
    )
