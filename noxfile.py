"""What a developer runs. All sessions share one environment, so that a second round takes seconds."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from pathlib import Path

import nox

nox.options.sessions = ["lint", "types", "tests"]

HERE = Path(__file__).parent
HOME = HERE / ".nox" / "crosstile"
PYTHON = HOME / ("Scripts" if os.name == "nt" else "bin") / "python"
EXTRAS = ["torch", "jax", "triton", "tpu", "models", "train", "transformers", "report", "dev"]
TORCH_FOR_CPU = ["torch==2.13.0+cpu", "--extra-index-url", "https://download.pytorch.org/whl/cpu", "--retries", "2"]
IN_PARALLEL = ["-n", "auto", "--dist", "worksteal"]  # a process a core; a few chosen tests start faster in one
SETTINGS = {
    "JAX_PLATFORMS": "cpu",  # libtpu is here to compile with; without this JAX would look for a TPU
    "TRITON_DEFAULT_FP_FUSION": "1",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}


def prepare(session: nox.Session) -> None:
    """Make the shared environment, once for each state of pyproject.toml and this file.

    On Linux the torch of PyPI brings gigabytes of CUDA, so its CPU build is installed by its full version first. triton
    and libtpu exist for Linux only; elsewhere what needs them says so. jax-triton imports only beside a GPU plugin, of
    which the plugin without its CUDA libraries is enough to lower.
    """
    stamp = HOME / "crosstile-installed"
    state = (HERE / "pyproject.toml").read_text() + Path(__file__).read_text() + sys.version
    digest = hashlib.sha256(state.encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == digest:
        return
    if not PYTHON.exists():
        session.run(sys.executable, "-m", "venv", str(HOME), external=True)
    linux = sys.platform == "linux"
    if linux:
        pip(session, *TORCH_FOR_CPU)
    extras = EXTRAS if linux else [extra for extra in EXTRAS if extra not in ("triton", "tpu")]
    pip(session, "-e", f"{HERE}[{','.join(extras)}]")
    if linux:
        show = "import importlib.metadata; print(importlib.metadata.version('jaxlib'))"
        jaxlib = str(session.run(str(PYTHON), "-c", show, external=True, silent=True)).strip()
        pip(session, "jax-triton>=0.3.1,<0.4")
        pip(session, "--no-deps", f"jax-cuda12-plugin=={jaxlib}")
    stamp.write_text(digest)


def pip(session: nox.Session, *args: str) -> None:
    """Install into the shared environment."""
    session.run(str(PYTHON), "-m", "pip", "install", "--quiet", *args, external=True)


def python(session: nox.Session, *args: str, **settings: str) -> None:
    """Run a module of the shared environment."""
    session.run(str(PYTHON), "-m", *args, env={**SETTINGS, **settings}, external=True)


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """Run the tests on this CPU, kernels interpreted: nox -s tests -- -k attention."""
    prepare(session)
    python(session, "pytest", *(session.posargs or IN_PARALLEL))


@nox.session(venv_backend="none")
def sweep(session: nox.Session) -> None:
    """Run the long tests too: more shapes, options and dtypes."""
    prepare(session)
    python(session, "pytest", "-m", "sweep or not sweep", *(session.posargs or IN_PARALLEL))


@nox.session(venv_backend="none")
def demo(session: nox.Session) -> None:
    """The main job: train, verify, compile, and write report/index.html."""
    prepare(session)
    python(session, "crosstile.bench.cli", "demo", *session.posargs)


@nox.session(venv_backend="none")
def compile(session: nox.Session) -> None:
    """Compile every kernel for all ten chips and check it: nox -s compile -- --target sm_90."""
    prepare(session)
    python(session, "crosstile.bench.cli", "compile", *session.posargs)


@nox.session(venv_backend="none")
def bench(session: nox.Session) -> None:
    """Time dispatch against the framework's own op on this CPU, and show where TPU kernels stand beside others'."""
    prepare(session)
    python(session, "crosstile.bench.cli", "bench", *session.posargs)
    if not session.posargs:
        python(session, "crosstile.bench.cli", "standings")


@nox.session(venv_backend="none")
def tune(session: nox.Session) -> None:
    """Search tiles and write the tuned tables: nox -s tune -- --op matmul --target v6e, or --device cuda with a GPU."""
    prepare(session)
    python(session, "crosstile.bench.cli", "tune", *session.posargs)


@nox.session(venv_backend="none")
def parity(session: nox.Session) -> None:
    """Compare every family of models with transformers, in NumPy, torch and JAX: nox -s parity -- llama gemma2."""
    prepare(session)
    python(session, "crosstile.models.parity", *session.posargs)


@nox.session(venv_backend="none")
def distributed(session: nox.Session) -> None:
    """Compare models on 4 torch processes and on 8 devices of JAX with one device: nox -s distributed -- tensor."""
    prepare(session)
    for framework in ("torch", "jax"):
        python(session, f"crosstile.models.parallel_check_{framework}", *session.posargs, OMP_NUM_THREADS="1")


@nox.session(name="docker-lint", venv_backend="none")
def docker_lint(session: nox.Session) -> None:
    """Check docs/deploy: Dockerfiles, manifests and scripts."""
    prepare(session)
    for command in deploy_checks(HERE / "docs" / "deploy"):
        session.run(str(PYTHON.parent / command[0]), *command[1:], external=True)


def deploy_checks(folder: Path) -> list[list[str]]:
    """The commands that check the files of such a folder."""

    def files(pattern: str) -> list[str]:
        return [str(path) for path in sorted(folder.glob(pattern))]

    schema = HERE / "docs" / "deploy"
    return [
        ["hadolint", *files("Dockerfile.*")],
        ["yamllint", "--strict", "-c", str(schema / "yamllint.yaml"), *files("*.yaml")],
        ["check-jsonschema", "--schemafile", str(schema / "jobset.schema.json"), *files("jobset-*.yaml")],
        ["shellcheck", *files("*.sh")],
    ]


@nox.session(venv_backend="none")
def lint(session: nox.Session) -> None:
    """Check format, style and the one-way imports."""
    prepare(session)
    python(session, "ruff", "format", "--check", ".")
    python(session, "ruff", "check", ".")
    session.run(str(PYTHON.parent / "lint-imports"), env={"PYTHONPATH": installed_copy(session)}, external=True)


@nox.session(venv_backend="none")
def types(session: nox.Session) -> None:
    """Check the types of an installed copy, as users' type checkers see it."""
    prepare(session)
    python(session, "mypy", "-p", "crosstile", MYPYPATH=installed_copy(session))


def installed_copy(session: nox.Session) -> str:
    """The package as users get it: tools that read files cannot follow the mapping of an editable install."""
    copy = HERE / ".nox" / "installed-copy"
    shutil.rmtree(copy, ignore_errors=True)
    pip(session, "--no-deps", "--target", str(copy), str(HERE))
    return str(copy)


@nox.session(venv_backend="none")
def docs(session: nox.Session) -> None:
    """Run every example of the README, the docs and the docstrings, and check their links."""
    prepare(session)
    python(session, "pytest", "tests/test_docs.py", *session.posargs)
