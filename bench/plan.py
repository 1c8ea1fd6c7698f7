"""`crosstile plan`: a whole step of a model on a pod that is not here, compiled for it and its time predicted.

The real compiler says whether the step fits, and how far it is from fitting where it does not. The cycles of every
program, ours and XLA's, are counted from their machine code (`cycles`), the links are modelled (`ici`), and the
schedule is replayed (`timeline`). Nothing here is measured.
"""

from __future__ import annotations

import json
import pickle
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path

from crosstile.models.config import Config
from crosstile.models.sharding import Parallel
from crosstile.models.stacking import period

from .cores import CORES, HBM_LATENCY, HBM_SHARE, PROGRAM_SECONDS
from .cycles import DUMP, Steering, cycles_of, run_child
from .hlo import Instruction, Module, exchanged_bytes, parse, replica_groups
from .ici import Pod, seconds, span
from .plan_asked import Asked
from .plan_estimate import estimate
from .timeline import Timeline, replay

SECONDS = 1500
_SAMPLED = (2, 4)  # periods of layers of which a step without a scan is compiled; the others take as long each
_MEMORY = re.compile(r"Used ([\d.]+)([KMG]) of ([\d.]+)([KMG]) hbm")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


class PlanError(RuntimeError):
    """The compiler refused for a reason other than memory."""


@dataclass(frozen=True)
class Plan:
    """What was found of one step on one pod.

    Attributes:
        asked: the step.
        pod: the chips.
        needed: bytes of HBM that a device needs.
        available: that it has for a program.
        memory: bytes by what they are for; empty where the step does not fit.
        timeline: of the step; None where it does not fit.
        compile_seconds: of the compiler, on this machine.
        sampled: layers that were compiled, where the time of the others was taken to be the same.
    """

    asked: Asked
    pod: Pod
    needed: float
    available: float
    memory: dict[str, float] = field(default_factory=dict)
    timeline: Timeline | None = None
    compile_seconds: float = 0.0
    sampled: tuple[int, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether a device has the memory."""
        return self.needed <= self.available

    @property
    def seconds(self) -> float:
        """Of a step, predicted; infinite where it does not fit."""
        return self.timeline.total if self.timeline and self.fits else inf

    @property
    def tokens(self) -> int:
        """Of a step: those trained on, read or generated."""
        return self.asked.batch * (1 if self.asked.step == "decode" else self.asked.seq)

    @property
    def tokens_per_device(self) -> float:
        """A second."""
        return self.tokens / self.seconds / self.pod.devices

    @property
    def mfu(self) -> float:
        """The model's operations, none that are done again, as a share of the published peak."""
        per_token = self.asked.config.flops_per_token(self.asked.seq)
        if self.asked.step != "train":
            per_token /= 3
        return per_token * self.tokens_per_device / self.pod.peak

    @property
    def dollars_per_million(self) -> float | None:
        """Of tokens, at the price of the chip, where one was seen."""
        dollars = self.pod.chip.dollars
        return None if dollars is None else dollars * self.pod.chips * self.seconds / 3600 / self.tokens * 1e6


def plan(asked: Asked, pod: Pod) -> Plan:
    """Compile a step for a pod and predict it.

    Training compiles equal layers once. The others are compiled with few layers, twice, and what a layer adds is
    added for the rest. Raises ValueError where the mesh is not the pod's, PlanError where the compiler refuses.
    """
    if asked.parallel.devices != pod.devices:
        raise ValueError(
            f"parallel: {asked.parallel.devices} devices in all; {pod} has {pod.devices}, so change one of its axes"
        )
    layers = asked.config.num_layers
    counts = tuple(count * period(asked.config) for count in _SAMPLED)
    if asked.step == "train" or layers <= counts[-1]:
        return _compiled(asked, pod)
    few, more = (_compiled(asked.of_layers(count), pod) for count in counts)
    return _extrapolated(asked, few, more, counts)


def search(
    config: Config,
    pod: Pod,
    step: str,
    seq: int,
    *,
    batches: Sequence[int] = (),
    meshes: Sequence[Parallel] = (),
    remats: Sequence[str] = (),
    tries: int = 3,
    tell: Callable[[Plan], None] = lambda plan: None,
) -> list[Plan]:
    """Compile the most promising of all batches, meshes and policies, and return what was found, the fastest first.

    Those not given are all that make sense. A roofline puts them in order; one that does not fit costs no try, up to
    as many again.
    """
    order = sorted(
        (
            (estimate(asked, pod), index, asked)
            for index, asked in enumerate(_candidates(config, pod, step, seq, batches, meshes, remats))
        ),
        key=lambda entry: (not entry[0].fits, entry[0].seconds_per_token, entry[1]),
    )
    if not order:
        raise ValueError(f"batch: no mesh of {pod} divides it; it must be a multiple of some power of two")
    found: list[Plan] = []
    for _, _, asked in order:
        if sum(one.fits for one in found) >= tries or len(found) >= 2 * tries:
            break
        found.append(plan(asked, pod))
        tell(found[-1])
    return sorted(found, key=lambda one: one.seconds / one.tokens)


def _candidates(
    config: Config,
    pod: Pod,
    step: str,
    seq: int,
    batches: Sequence[int],
    meshes: Sequence[Parallel],
    remats: Sequence[str],
) -> Iterator[Asked]:
    policies = remats or (("none", "products", "full") if step == "train" else ("none",))
    for mesh in meshes or list(_meshes(config, pod, step)):
        rows = mesh.batch_parts
        for batch in batches or [rows * each for each in (1, 2, 3, 4, 6, 8)]:
            if batch % rows == 0:
                for policy in policies:
                    yield Asked(config, step, mesh, batch, seq, policy)


def _meshes(config: Config, pod: Pod, step: str) -> Iterator[Parallel]:
    """Tensor parallelism up to the heads of keys; the rest shards the weights in training, copies them in serving."""
    tensor = 1
    while tensor <= min(config.num_kv_heads, pod.devices):
        others = pod.devices // tensor
        yield Parallel(fsdp=others, tensor=tensor) if step == "train" else Parallel(data=others, tensor=tensor)
        tensor *= 2


def _compiled(asked: Asked, pod: Pod) -> Plan:
    with tempfile.TemporaryDirectory(prefix="crosstile-plan-") as name:
        folder = Path(name)
        (folder / "asked.pickle").write_bytes(pickle.dumps((asked, pod)))
        refusal = run_child("plan_child", folder, seconds=SECONDS)
        if refusal is not None:
            return _refused(asked, pod, refusal)
        facts = json.loads((folder / "facts.json").read_text())
        module = parse((folder / "module.txt").read_text())
        return Plan(
            asked,
            pod,
            sum(facts["memory"].values()),
            pod.hbm_bytes,
            facts["memory"],
            timeline_of(module, folder / DUMP, pod, facts["places"], facts["steering"]),
            facts["seconds"],
        )


def _refused(asked: Asked, pod: Pod, words: str) -> Plan:
    memory = _MEMORY.search(words)
    if memory is None:
        raise PlanError(f"{pod}: the compiler refuses: {words.strip()[:1500]}")
    used, available = (float(memory.group(at)) * _UNITS[memory.group(at + 1)] for at in (1, 3))
    return Plan(asked, pod, used, available)


def timeline_of(
    module: Module, dump: Path, pod: Pod, places: Sequence[Sequence[int]], steering: Steering = ()
) -> Timeline:
    """The replay of a compiled step, whose programs' bundles lie in `dump`, and whose kernels these words steer."""
    bandwidth = pod.bandwidth * HBM_SHARE

    def exchange(collective: Instruction) -> tuple[float, int]:
        group = next(iter(replica_groups(collective)), list(range(len(places))))
        where = span(pod, [places[device] for device in group])
        size = exchanged_bytes(collective, len(group))
        return seconds(pod, collective.opcode, size, where), len(group)

    return replay(
        module,
        cycles=module.for_all(cycles_of(dump, pod.chip.name, module.programs, steering)),
        clock=CORES[pod.chip.name].clock,
        between=PROGRAM_SECONDS,
        exchange=exchange,
        copy=lambda size: size / bandwidth + HBM_LATENCY,
    )


def _extrapolated(asked: Asked, few: Plan, more: Plan, counts: tuple[int, ...]) -> Plan:
    """What all layers need, from two plans with fewer."""
    share = (asked.config.num_layers - counts[0]) / (counts[1] - counts[0])

    def extended(first: float, second: float) -> float:
        return first + share * (second - first)

    memory = {name: extended(few.memory[name], size) for name, size in more.memory.items()} if few.memory else {}
    timeline = None
    if few.timeline and more.timeline:
        timeline = few.timeline.extended(more.timeline, share)
    return replace(
        more,
        asked=asked,
        needed=extended(few.needed, more.needed),
        memory=memory,
        timeline=timeline,
        compile_seconds=few.compile_seconds + more.compile_seconds,
        sampled=counts,
    )
