"""What `nox -s docker-lint` runs passes the files of docs/deploy, and refuses each kind of broken file."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "docs" / "deploy"
BROKEN = {
    "Dockerfile.cpu": ("hadolint", "python:3.11-slim-bookworm", "python:latest"),
    "Dockerfile.tpu": ("hadolint", "USER 1000", "USER root"),
    "jobset-gpu.yaml": ("check-jsonschema", "                  image: registry.example.com/crosstile:cuda\n", ""),
    "jobset-tpu.yaml": ("yamllint", "kind: JobSet", "kind: [JobSet"),
    "slurm.sh": ("shellcheck", '--config "$recipe"', "--config $recipe"),
}
TOOLS = Path(sys.executable).parent

pytestmark = pytest.mark.skipif(shutil.which("hadolint", path=TOOLS) is None, reason="the dev extra is not installed")


@pytest.fixture(scope="module")
def noxfile():
    spec = importlib.util.spec_from_file_location("crosstile_noxfile", ROOT / "noxfile.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def failing(noxfile, folder):
    """The tools that refuse a folder."""
    commands = noxfile.deploy_checks(folder)
    return [tool for tool, *args in commands if subprocess.run([TOOLS / tool, *args], capture_output=True).returncode]


def test_the_files_pass(noxfile):
    assert not failing(noxfile, DEPLOY)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_does_not(noxfile, name, tmp_path):
    tool, right, wrong = BROKEN[name]
    folder = shutil.copytree(DEPLOY, tmp_path / "deploy")
    text = (folder / name).read_text()
    assert right in text
    (folder / name).write_text(text.replace(right, wrong))
    assert tool in failing(noxfile, folder)
