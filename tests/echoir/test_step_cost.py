"""What one step of ASBLO costs beside a single-level one: its passes and its memory, which no load disturbs."""

import sys

import pytest
import torch
from scenes import EXAMPLE

sys.path.insert(0, str(EXAMPLE.parents[1] / "benchmarks"))

import echoir_step

CPU = torch.device("cpu")
SMALL = echoir_step.Arguments(patch=64, batch=2, lower_batch=2, device="cpu")


@pytest.fixture(scope="module")
def single_level_memory():
    return echoir_step.live_memory(echoir_step.prepare(SMALL, "restoration", "single-level", CPU))


@pytest.mark.parametrize("lower", echoir_step.GOALS)
def test_three_passes_and_little_more_memory(lower, single_level_memory):
    run = echoir_step.prepare(SMALL, lower, "asblo", CPU)
    memory = echoir_step.live_memory(run)
    assert memory < echoir_step.MEMORY_GOAL * single_level_memory
    steps = echoir_step.stepping(run)
    before, after = (next(steps).evaluations for _ in range(2))
    assert after.upper_grad - before.upper_grad == 1  # F(x, y)
    assert after.lower_grad - before.lower_grad == 2  # f(x, y) and f(x, z)
    assert after.hvp == 0


def test_the_table_has_a_row_for_each_lower_objective():
    tiny = echoir_step.Arguments("cpu", patch=16, batch=1, lower_batch=1, rounds=1, device="cpu")
    found = echoir_step.costs(tiny)
    assert list(found) == ["single level", "restoration", "echo", "both"]
    assert found["single level"].ratio == found["single level"].memory == 1.0
    assert all(cost.seconds > 0 for cost in found.values())
