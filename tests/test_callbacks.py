"""Checkpoints of a run: what is kept, what a damaged file does, and that going on changes nothing."""

import pytest
import torch

import bilevel as bl
from bilevel.callbacks import Checkpoint


@pytest.fixture
def problem():
    return bl.BilevelProblem(
        upper=lambda x, y, data: ((y - 1.0) ** 2).sum() + 0.1 * (x**2).sum(),
        lower=lambda x, y, data: ((y - 2.0 * x) ** 2).sum() + (y**4).sum(),
    )


def start():
    return torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def run(problem, checkpoint, steps):
    """Up to `steps` steps, from the newest checkpoint."""
    newest = checkpoint.newest()
    x0, y0 = start() if newest is None else (None, None)
    states = bl.iterate(problem, bl.F2SA(), x0, y0, state=newest)
    while (state := next(states)).step < steps:
        checkpoint(state)
    checkpoint(state)
    return state


def test_it_saves_every_so_many_steps_and_keeps_the_last(problem, tmp_path):
    folder = tmp_path / "a" / "run"
    run(problem, Checkpoint(folder, every=3), steps=11)
    assert names(folder) == ["step-000000006.pt", "step-000000009.pt"]
    run(problem, Checkpoint(folder, every=5, keep=1), steps=16)
    assert names(folder) == ["step-000000015.pt"]


def test_going_on_equals_never_having_stopped(problem, tmp_path):
    whole = run(problem, Checkpoint(tmp_path / "whole", every=100), steps=12)
    checkpoint = Checkpoint(tmp_path / "parts", every=1)
    for stop in (1, 4, 5, 12):
        last = run(problem, checkpoint, steps=stop)
    assert torch.equal(last.x, whole.x)
    assert torch.equal(last.y, whole.y)


def test_the_state_that_ends_a_run_is_saved(problem, tmp_path):
    checkpoint = Checkpoint(tmp_path, every=10**6)
    solution = bl.solve(problem, bl.ASBLO(), *start(), max_steps=500, callback=checkpoint)
    assert solution.status is bl.Status.CONVERGED
    assert checkpoint.newest().step == solution.steps


def test_a_damaged_file_is_set_aside_and_the_one_before_is_taken(problem, tmp_path):
    checkpoint = Checkpoint(tmp_path, every=2)
    run(problem, checkpoint, steps=6)
    newest = tmp_path / "step-000000006.pt"
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.warns(bl.BilevelWarning, match=r"sha256.*Going on from step 4"):
        assert checkpoint.newest().step == 4
    assert names(tmp_path) == ["step-000000004.pt", "step-000000006.damaged"]
    run(problem, checkpoint, steps=6)
    assert checkpoint.newest().step == 6


def test_nothing_but_damaged_files_is_an_error_each_time(problem, tmp_path):
    checkpoint = Checkpoint(tmp_path, every=2)
    run(problem, checkpoint, steps=4)
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    for _ in range(2):
        with pytest.raises(bl.CheckpointError, match="Got only damaged ones"):
            checkpoint.newest()


def test_a_folder_of_a_later_run_is_refused(problem, tmp_path):
    checkpoint = Checkpoint(tmp_path, every=2)
    run(problem, checkpoint, steps=6)
    state = next(bl.iterate(problem, bl.F2SA(), *start()))
    with pytest.raises(ValueError, match=r"step-000000006\.pt.*folder for each run"):
        Checkpoint(tmp_path, every=1)(state)
    assert names(tmp_path) == ["step-000000004.pt", "step-000000006.pt"]


def test_wrong_arguments(tmp_path):
    with pytest.raises(TypeError, match="Checkpoint"):
        Checkpoint(3)
    with pytest.raises(ValueError, match="every"):
        Checkpoint(tmp_path, every=0)
