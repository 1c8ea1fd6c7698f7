"""A child process that compiles one step for a pod that is not here: `python -m crosstile.bench.plan_child FOLDER`.

FOLDER/asked.pickle holds an `Asked` and a `Pod`; the child leaves `module.txt`, the scheduled HLO, `facts.json`, and
the dump of every program's bundles, or `refusal.txt` with the compiler's words.
"""

from __future__ import annotations

import json
import pickle
import sys
import time
from pathlib import Path
from typing import Any

from .dumping import leaving_refusal


def compile_step(folder: Path) -> None:
    """Read what is asked, compile it, and leave what was found."""
    from jax.experimental import topologies

    import crosstile
    from crosstile.models.distributed_jax import make_mesh

    from .ici import places_of
    from .plan_programs import known_values, program
    from .steering import steering

    asked, pod = pickle.loads((folder / "asked.pickle").read_bytes())
    mesh = make_mesh(asked.parallel, topologies.get_topology_desc(pod.topology, platform="tpu").devices)
    step, arguments = program(asked, mesh)
    began = time.perf_counter()
    with crosstile.target(pod.chip.name):
        traced = step.trace(*arguments)
        lowered = traced.lower(lowering_platforms=("tpu",))
    compiled = lowered.compile()
    facts: dict[str, Any] = {
        "seconds": time.perf_counter() - began,
        "places": places_of(list(mesh.devices.flat)),
        "memory": _memory(compiled.memory_analysis()),
        "steering": steering(traced.jaxpr, values) if (values := known_values(asked, arguments)) else [],
    }
    (folder / "module.txt").write_text(compiled.as_text())
    (folder / "facts.json").write_text(json.dumps(facts))


def _memory(analysis: Any) -> dict[str, int]:
    """Bytes of a device: what is there before and after the step, and what it needs beside."""
    return {
        "arguments": analysis.argument_size_in_bytes,
        "results": analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
        "code": analysis.generated_code_size_in_bytes,
    }


if __name__ == "__main__":
    with leaving_refusal(Path(sys.argv[1])):
        compile_step(Path(sys.argv[1]))
