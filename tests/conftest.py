"""What all tests share: where they run, seeds, and the environment that jax and triton read when imported."""

from __future__ import annotations

import os
import random
import sys

import numpy as np
import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=("cpu", "cuda", "tpu"),
        default="cpu",
        help="run the kernels in their interpreters (cpu), or on this machine's chip",
    )


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns without it
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process a core: on small arrays more threads take longer
    device = config.getoption("--device")
    if device != "tpu":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # libtpu may be here to compile with
    if device == "cuda":
        import torch

        torch.use_deterministic_algorithms(True, warn_only=True)  # which also fills torch.empty with NaN


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """ "cpu", "cuda" or "tpu"; a test that cannot run there skips itself."""
    return request.config.getoption("--device")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
