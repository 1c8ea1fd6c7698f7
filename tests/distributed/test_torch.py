"""torch on 4 processes: ops on DTensors against whole arrays, models against one device, and that both can fail."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
import torch_processes
from torch_processes import BROKEN, CALLS, HANDFUL, REFUSED

from crosstile.models.config import Config
from crosstile.models.distributed_torch import shard
from crosstile.models.sharding import Parallel


def test_shard_needs_processes_and_heads_that_divide_and_has_no_stages():
    with pytest.raises(ValueError, match="stage: got 2; in torch it must be 1"):
        shard(Config.demo(), Parallel(stage=2))
    with pytest.raises(RuntimeError, match="init_process_group"):
        shard(Config.demo(), Parallel(fsdp=4))
    with pytest.raises(ValueError, match="context: got 8 with 4 heads"):
        shard(Config.demo(), Parallel(context=8, context_form="ulysses"))


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    return torch_processes.answers(tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("name", CALLS)
def test_an_op_of_dtensors_is_that_of_whole_arrays(answers, name):
    assert answers["calls"][name] < 1e-13  # in float64


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_split_is_refused_by_name(answers, name):
    assert answers["refused"][name].startswith(f"{REFUSED[name][-1]}: ")


@pytest.mark.parametrize("name", HANDFUL)
def test_a_model_on_many_devices_is_that_on_one(answers, name):
    assert answers["rows"][name].passes, answers["rows"][name]


def test_steps_evaluations_and_logits_are_those_of_one_device(answers):
    assert answers["course"] < 1e-9  # in float64; AdamW divides by roots of small squares


@pytest.mark.parametrize("name", BROKEN)
def test_the_check_sees_what_is_broken(answers, name):
    assert not answers["broken"][name].passes
