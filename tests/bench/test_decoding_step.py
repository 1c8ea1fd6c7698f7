"""A decoding step as the real compiler makes it for a pod: the cache stays where it is, and keys are read once."""

from __future__ import annotations

import json
import pickle

import numpy as np

from crosstile.bench import ici
from crosstile.bench.cycles import run_child
from crosstile.bench.hlo import parse
from crosstile.bench.plan_asked import Asked
from crosstile.models.known import known
from crosstile.models.sharding import Parallel

IN_PLACE = {"parameter", "tuple", "get-tuple-element", "bitcast", "dynamic-update-slice"}


def test_the_cache_is_written_in_place_and_never_copied(tmp_path):
    asked = Asked(known("llama-3-8b"), "decode", Parallel(tensor=4), batch=8, seq=2048).of_layers(1)
    (tmp_path / "asked.pickle").write_bytes(pickle.dumps((asked, ici.pod("v5e:2x2"))))
    assert run_child("plan_child", tmp_path) is None
    module = parse((tmp_path / "module.txt").read_text())
    facts = json.loads((tmp_path / "facts.json").read_text())
    instructions = [one for listed in module.computations.values() for one in listed]
    keys = 8 * 2 * 2048 * 128 * 2  # of a device, in bytes
    assert {one.opcode for one in instructions if "bf16[8,2,2048,128]" in one.result} <= IN_PLACE
    assert sum(one.opcode == "dynamic-update-slice" for one in instructions) == 2
    assert facts["memory"]["temporaries"] < keys
    words = dict(facts["steering"])["attention_decode"]["0"]
    assert np.reshape(words, (2, -1))[:, :8].tolist() == [[1] * 8, [2048] * 8]
