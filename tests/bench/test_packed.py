"""Programs compiled for a GPU elsewhere: what a launch is called, what it is given, and what the folder holds."""

import ctypes
import json
import re
import threading
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from typer.testing import CliRunner

from crosstile import torch as glue
from crosstile.bench import chip, packed
from crosstile.bench.cli import app
from crosstile.bench.gpu import compiled_launch, specialise
from crosstile.bench.programs import Job, directions, gpu_plan
from crosstile.bench.shape import numpy_dtype
from crosstile.bench.shapes import SHAPES, get_shape
from crosstile.kernels.tiles.targets import get_target
from crosstile.torch import describe

SM_90 = get_target("sm_90")
NORM = Job("sm_90", "norm", "backward", "gpt-2-norm", "bfloat16")


def plan_of(job):
    plan = gpu_plan(job)
    return plan.launches, {**plan.inputs, **plan.outputs, **plan.scratch}


def key_of(launch, arrays):
    return packed.key_of(launch, specialise(launch, arrays, SM_90))


def test_a_key_says_all_that_the_compiler_was_told():
    (launch, *_), arrays = plan_of(NORM)
    key = key_of(launch, arrays)
    assert key == key_of(launch, arrays)
    name = launch.inputs[0]
    odd = {**arrays, name: replace(arrays[name], aligned=False)}
    other = {**arrays, name: replace(arrays[name], dtype="float32")}
    changed = [
        key_of(launch, odd),
        key_of(launch, other),
        key_of(replace(launch, num_warps=1), arrays),
        key_of(replace(launch, num_stages=7), arrays),
    ]
    assert len({key, *changed}) == 5


@pytest.mark.parametrize(
    "job",
    [
        NORM,
        Job("sm_90", "rotary", "forward", "llama-3-8b-rotary", "bfloat16"),
        Job("sm_90", "attention", "forward", "llama-3-8b-decode", "bfloat16"),
    ],
    ids=str,
)
def test_a_launch_gives_what_the_program_takes(job):
    """The parameters of the PTX, of which the last two are memory that Triton's launcher gives."""
    sizes = {"u64": 8, "b64": 8, "s64": 8, "u32": 4, "b32": 4, "s32": 4, "f32": 4, "u8": 1, "b8": 1}
    for launch in plan_of(job)[0][:1]:
        arrays = plan_of(job)[1]
        tensors = [
            torch.empty(1, dtype=getattr(torch, str(numpy_dtype(arrays[name].dtype)))) if name else None
            for name in (*launch.inputs, *launch.outputs)
        ]
        given = packed.arguments(launch, specialise(launch, arrays, SM_90)[0], tensors)
        ptx = compiled_launch(launch, arrays, SM_90).asm["ptx"]
        entry = re.search(r"\.entry [^(]*\((.*?)\)", ptx, re.DOTALL).group(1)
        taken = [sizes[kind] for kind in re.findall(r"\.param \.(\w+)", entry)]
        assert [ctypes.sizeof(value) for value in given] == taken[:-2]
        assert taken[-2:] == [8, 8]
        pointers = [value.value for value in given if isinstance(value, ctypes.c_void_p)]
        assert pointers == [tensor.data_ptr() for tensor in tensors if tensor is not None]


@pytest.fixture
def a_gpu_that_keeps_launches(monkeypatch):
    """torch's CPU in the place of a GPU: kernels are planned for sm_90, and their launches kept."""
    kept = []
    monkeypatch.setattr(glue, "target_of", lambda array: SM_90)
    monkeypatch.setattr(glue, "obstacles", lambda *arguments: ())
    monkeypatch.setattr(glue, "on_cpu", lambda array: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    with glue.launching(lambda launch, tensors: kept.append((launch, tensors))):
        yield kept


@pytest.mark.parametrize(
    "name",
    [
        "llama-3.2-1b@q_len=256,kv_len=256",
        "mpt-7b-alibi@q_len=256,kv_len=256",
        "llama-3-8b-bias@q_len=256,kv_len=256",
        "llama-3-8b-down@m=256",
        "llama-3-8b-norm@rows=64",
        "llama-3-8b-rotary@length=64",
        "llama-3-8b-head@tokens=128,vocab=4096",
        "llama-3-8b-gate-int4@m=64,n=256",
        "qwen3-30b-a3b-down@tokens=512",
        "mixtral-8x7b-down-int4@tokens=64",
    ],
)
def test_a_call_launches_what_pack_compiles(name, a_gpu_that_keeps_launches):
    shape = get_shape(name)
    packed_keys = set()
    for direction in directions(shape):
        launches, arrays = plan_of(Job("sm_90", shape.op, direction, name, "bfloat16"))
        packed_keys |= {key_of(launch, arrays) for launch in launches}
    arrays = chip.random_arrays(shape, "bfloat16", "cpu")
    chip._results(partial(shape.run, implementation="triton"), arrays, shape.leaves("bfloat16"))
    assert a_gpu_that_keeps_launches
    for launch, tensors in a_gpu_that_keeps_launches:
        names = (*launch.inputs, *launch.outputs)
        given = {name: describe(tensor) for name, tensor in zip(names, tensors, strict=True) if tensor is not None}
        assert key_of(launch, given) in packed_keys, launch.kernel.__name__


def test_launching_reaches_every_thread():
    """autograd runs a backward on a GPU on a thread of its own."""

    def mine(launch, tensors):
        raise AssertionError

    seen = []
    with glue.launching(mine):
        thread = threading.Thread(target=lambda: seen.append(glue._launcher.run))
        thread.start()
        thread.join()
    assert seen == [mine]


def test_pack_writes_each_program_once(tmp_path):
    assert list(packed.pack([NORM], tmp_path)) == [NORM]
    launches, arrays = plan_of(NORM)
    keys = {key_of(launch, arrays) for launch in launches}
    assert {file.stem for file in tmp_path.glob("*.cubin")} == keys
    for key in keys:
        facts = packed.Program(**json.loads((tmp_path / f"{key}.json").read_text()))
        assert (tmp_path / f"{key}.cubin").read_bytes().find(facts.name.encode()) > 0
        assert facts.threads % 32 == 0
        assert facts.threads > 0
    before = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    list(packed.pack([NORM], tmp_path))
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}


def test_every_shape_says_what_its_integers_hold():
    for shape in SHAPES:
        arrays, held = shape.arrays("bfloat16"), shape.integers()
        integers = {name for name, (_, kind) in arrays.items() if kind == "int32"}
        assert set(held) >= integers, shape.name
        assert all(array.shape == arrays[name][0] for name, array in held.items()), shape.name


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_bench_says_that_there_is_no_gpu():
    found = CliRunner().invoke(app, ["bench", "--device", "cuda", "--op", "norm"])
    assert found.exit_code == 2
    assert "torch finds no GPU" in found.output
