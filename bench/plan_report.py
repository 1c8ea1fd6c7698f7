"""How a plan is told: what was compiled, whether it fits, where the time goes, what travels, and what it costs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .plan import Plan
from .published import Published

_EXCHANGES = 12
GIB = 2**30


def mesh_in_words(plan: Plan) -> str:
    """Such as "fsdp 128, tensor 2"."""
    sizes = [f"{axis} {size}" for axis, size in plan.asked.parallel.sizes.items() if size > 1]
    form = plan.asked.parallel.context_form if plan.asked.parallel.context > 1 else ""
    return ", ".join([*sizes, *([form] if form else [])]) or "one device"


def line(plan: Plan) -> str:
    """A plan in one line."""
    asked = plan.asked
    what = f"batch {asked.batch}, {mesh_in_words(plan)}" + (f", remat {asked.remat}" if asked.step == "train" else "")
    if not plan.fits:
        over = (plan.needed - plan.available) / GIB
        return f"{what}: does not fit, {plan.needed / GIB:.1f} GiB of {plan.available / GIB:.1f}, {over:.1f} too many"
    speed = f"{plan.seconds:.4g} s a step, {plan.tokens_per_device:,.0f} token/s a device"
    return f"{what}: {plan.needed / GIB:.1f} GiB, {speed}, MFU {plan.mfu:.1%}"


def show(plans: Sequence[Plan], other: Published | None, console: Console) -> None:
    """The fastest plan at length, with what others measured, if it is known."""
    best = plans[0]
    if not best.fits:
        console.print("Nothing fits. The nearest:", line(min(plans, key=lambda plan: plan.needed)), highlight=False)
        return
    console.print(f"\n[bold]{best.pod}, {best.asked.step}: {line(best)}[/bold]", highlight=False)
    console.print(_cost(best), highlight=False)
    if best.sampled:
        counts = " and ".join(map(str, best.sampled))
        console.print(f"{counts} layers were compiled; each of the others takes what one of these does.")
    console.print(_memory(best), _times(best), _exchanges(best))
    if other is not None:
        ratio = best.tokens_per_device / other.tokens_per_device
        console.print(
            f"Published, measured: {other.tokens_per_device:,.0f} token/s a device ({other.settings}; {other.source}). "
            f"Predicted over that: {ratio:.2f}",
            highlight=False,
            soft_wrap=True,
        )


def _cost(plan: Plan) -> str:
    dollars = plan.dollars_per_million
    price = "no price is known" if dollars is None else f"${dollars:,.3f} a million tokens at ${plan.pod.chip.dollars}"
    return f"predicted, not measured; compiled in {plan.compile_seconds:.0f} s; {price} a chip and hour"


def _memory(plan: Plan) -> Table:
    table = Table(title="memory of a device, as the compiler has it", box=None, title_justify="left")
    table.add_column("")
    table.add_column("GiB", justify="right")
    for name, size in plan.memory.items():
        table.add_row(name, f"{size / GIB:.2f}")
    table.add_row("free", f"{(plan.available - plan.needed) / GIB:.2f}")
    return table


def _times(plan: Plan) -> Table:
    table = Table(title="where a step's time goes", box=None, title_justify="left")
    for heading in ("", "ms", "%"):
        table.add_column(heading, justify="right" if heading else "left")
    assert plan.timeline is not None
    for kind, seconds in sorted(plan.timeline.seconds.items(), key=lambda item: -item[1]):
        table.add_row(kind, f"{seconds * 1e3:.2f}", f"{seconds / plan.seconds:.1%}")
    if plan.timeline.guessed:
        share = plan.timeline.guessed / plan.seconds
        table.add_row("of these, the compiler's guesses", f"{plan.timeline.guessed * 1e3:.2f}", f"{share:.1%}")
    if plan.timeline.unknown:
        table.add_row(f"not counted: {', '.join(sorted(plan.timeline.unknown))}")
    return table


def _exchanges(plan: Plan) -> Table:
    table = Table(title="what travels between devices", box=None, title_justify="left")
    for heading in ("collective", "devices", "MB", "times", "ms", "ms waited for", "of"):
        table.add_column(heading, justify="left" if heading in ("collective", "of") else "right")
    assert plan.timeline is not None
    order = sorted(plan.timeline.exchanges.values(), key=lambda one: -one.seconds)
    for one in order[:_EXCHANGES]:
        cells = f"{one.bytes / 1e6:,.2f}", f"{one.count:.0f}", f"{one.seconds * 1e3:.2f}", f"{one.waited * 1e3:.2f}"
        table.add_row(one.kind, str(one.devices), *cells, one.where)
    if rest := order[_EXCHANGES:]:
        seconds, waited = sum(one.seconds for one in rest), sum(one.waited for one in rest)
        count = sum(one.count for one in rest)
        table.add_row("others", "", "", f"{count:.0f}", f"{seconds * 1e3:.2f}", f"{waited * 1e3:.2f}", "")
    return table


def facts(plan: Plan) -> dict[str, Any]:
    """A plan as plain data."""
    asked, timeline = plan.asked, plan.timeline
    return {
        "pod": str(plan.pod),
        "step": asked.step,
        "batch": asked.batch,
        "seq": asked.seq,
        "mesh": asked.parallel.sizes,
        "remat": asked.remat,
        "fits": plan.fits,
        "bytes": plan.needed,
        "bytes_available": plan.available,
        "memory": plan.memory,
        "seconds": plan.seconds if plan.fits else None,
        "tokens_per_device_per_second": plan.tokens_per_device if plan.fits else None,
        "mfu": plan.mfu if plan.fits else None,
        "dollars_per_million_tokens": plan.dollars_per_million if plan.fits else None,
        "time": timeline.seconds if timeline else {},
        "guessed_seconds": timeline.guessed if timeline else 0.0,
        "collectives": [vars(one) for one in timeline.exchanges.values()] if timeline else [],
        "compile_seconds": plan.compile_seconds,
    }


def write_json(plans: Sequence[Plan], file: Path) -> None:
    """All plans, the fastest first."""
    file.write_text(json.dumps([facts(plan) for plan in plans], indent=2) + "\n")
