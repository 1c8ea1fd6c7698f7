"""`crosstile demo`: the main job, end to end, in some six minutes on two cores.

A transformer trains on real text in torch and in JAX and writes a sample; every kernel is verified against NumPy, and
compiled for ten chips that are not here; a report shows it all.
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from math import log
from pathlib import Path

from rich.console import Console

from crosstile.kernels.tiles.targets import TARGETS

from . import compile as compiling
from . import report as reporting
from . import verify as verifying
from .cases import CASES
from .cases import QUICK as QUICK_CASES
from .programs import jobs_for
from .progress import bars
from .report import Report, TrainingRun
from .shapes import QUICK as QUICK_SHAPES
from .shapes import get_shape
from .verify import Check

FRAMEWORKS = ("torch", "jax")
PROMPT = "def main("
SAMPLE_BYTES = 400
TEMPERATURE = 0.6


@dataclass(frozen=True)
class Proof:
    """What verification and compilation found; nothing was compiled where there are no compilers."""

    checks: list[Check]
    compiled: compiling.CompileReport | None


def demo(folder: Path, seconds: float, console: Console) -> bool:
    """Do it all and write the report. Whether the losses fell, the kernels agree and every compilation is in budget."""
    started = time.perf_counter()
    kernels, targets = list(verifying.KERNELS), list(TARGETS)
    if sys.platform != "linux":
        kernels.remove("triton")
        targets.clear()
        console.print("Triton and libtpu have wheels for Linux only: their kernels and compilers are left out here.")
    try:
        compiling.check_compilers(targets)
        verifying.check_installed(FRAMEWORKS, kernels)
    except (compiling.NoCompilerError, verifying.MissingError) as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        return False
    if find_spec("jinja2") is None:
        console.print("no jinja2, which writes the report: pip install 'crosstile[report]'", style="red", markup=False)
        return False

    runs = [_train(framework, seconds, console) for framework in FRAMEWORKS]
    console.rule("the kernels against NumPy, and their machine code for chips that are not here", align="left")
    proof = _prove(kernels, targets, console)
    verifying.show(proof.checks, console)
    if proof.compiled:
        compiling.show(proof.compiled, console)

    took = time.perf_counter() - started
    path = reporting.write(Report(runs, proof.checks, proof.compiled, seconds=took), folder)
    failures = _failures(runs, proof)
    for failure in failures:
        console.print(f"[red]fails[/] {failure}", highlight=False)
    console.print(f"{'[red]failed' if failures else '[green]all is well'}[/], after {took:.0f} s", highlight=False)
    console.print(f"report: {path}", highlight=False, soft_wrap=True)
    return not failures


def _train(framework: str, seconds: float, console: Console) -> TrainingRun:
    """Train for that long, say what came of it, and let the model write."""
    from crosstile.models.config import Config
    from crosstile.models.data import decode, encode
    from crosstile.models.generate import generate
    from crosstile.models.train import train

    console.rule(f"training in {framework} for {seconds:.0f} s", align="left")
    config = Config.demo()
    started = time.perf_counter()
    result = train(config, framework, seconds=seconds, progress=console.is_terminal)
    took = time.perf_counter() - started
    console.print(
        f"held out: {result.bits_before:.3f} → {result.bits_after:.3f} bits per byte, {len(result.losses)} steps, "
        f"{result.tokens_per_second:,.0f} token/s, MFU {result.mfu:.0%}",
        highlight=False,
    )
    prompt = encode(PROMPT)[None]
    tokens = generate(result.params, config, prompt, SAMPLE_BYTES, temperature=TEMPERATURE, seed=0)
    text = decode(tokens[0][prompt.shape[1] :])
    sample = "".join(letter if letter.isprintable() or letter == "\n" else "·" for letter in text)
    console.print(f"{PROMPT}{sample}", style="dim", markup=False, highlight=False)
    return TrainingRun(
        framework=framework,
        losses=[(step, loss / log(2)) for step, loss in enumerate(result.losses)],
        held_out=result.held_out,
        seconds=took,
        tokens_per_second=result.tokens_per_second,
        mfu=result.mfu,
        parameters=config.num_params,
        prompt=PROMPT,
        sample=sample,
    )


def _prove(kernels: list[str], targets: list[str], console: Console) -> Proof:
    """Verify in this process while the compilers work in others."""
    cases = [case for case in CASES if case.name in QUICK_CASES]
    jobs = jobs_for(targets, [get_shape(name) for name in QUICK_SHAPES], ["bfloat16"])
    with bars(console) as progress, ThreadPoolExecutor(1) as aside:
        compiled = aside.submit(compiling.compile_jobs, jobs, progress) if jobs else None
        checks = verifying.verify(FRAMEWORKS, kernels, cases, progress)
        return Proof(checks, compiled.result() if compiled else None)


def _failures(runs: list[TrainingRun], proof: Proof) -> list[str]:
    """Why the demo as a whole fails, a sentence each."""
    found = [f"{run.name}: the held-out loss did not fall" for run in runs if run.held_out[-1][1] >= run.held_out[0][1]]
    over = sum(not check.passes for check in proof.checks)
    if over:
        found.append(f"{over} kernels are over the allowed error")
    if proof.compiled and proof.compiled.failures:
        found.append(f"{len(proof.compiled.failures)} compilations are over budget")
    return found
