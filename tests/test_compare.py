import itertools
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import bilevel as bl
from bilevel.testing import problems

CASE = problems.quadratic()
START = CASE.x0, CASE.y0
SOLVERS = {
    "ASBLO": bl.ASBLO(),
    "implicit": bl.HypergradientDescent(bl.Implicit()),
    "unrolled": bl.HypergradientDescent(bl.Unrolled(40, lr=0.15), rtol=1e-6),
}


def test_runs_end_at_their_budget_or_their_answer() -> None:
    found = bl.compare(CASE.problem, SOLVERS, *START, budget=300)
    assert [run.name for run in found.runs] == list(SOLVERS)
    for run in found.runs:
        spent = run.evaluations.gradients + run.evaluations.hvp
        assert run.status is bl.Status.CONVERGED or spent >= 300
        assert run.costs[-1] == spent
        assert list(run.costs) == sorted(run.costs)
        assert run.values[-1] == run.upper
        if len(run.costs) > 1 and run.status is bl.Status.RUNNING:
            assert run.costs[-2] < 300
    rows = str(found).splitlines()
    assert len(rows) == 5
    assert rows[-1] == "budget: 300 gradients and HVPs each"
    assert rows[0].split() == [
        *("method", "F", "gap", "trusted", "gradients", "HVPs", "memory", "seconds", "ended")
    ]


def test_large_budget_reaches_the_answer() -> None:
    (run,) = bl.compare(CASE.problem, {"i": SOLVERS["implicit"]}, *START, budget=10**6).runs
    assert run.upper == pytest.approx(CASE.upper_star, rel=1e-9)
    assert run.is_trusted
    assert run.status is bl.Status.CONVERGED


def test_memory_of_unrolling_grows_with_its_steps() -> None:
    def quartic(x: torch.Tensor, y: torch.Tensor, data: object) -> torch.Tensor:
        return 0.1 * (y**4).sum() + CASE.problem.lower(x, y, data)

    runs = bl.compare(
        bl.BilevelProblem(CASE.problem.upper, quartic),
        {str(n): bl.HypergradientDescent(bl.Unrolled(n, lr=0.1)) for n in (10, 50, 100)},
        *START,
        budget=1,
    ).runs
    few, more, most = (run.memory for run in runs)
    # The graph of each step holds y and some powers of it.
    assert 1 <= (more - few) / (40 * CASE.y0.nbytes) <= 8
    assert (most - more) / 50 == pytest.approx((more - few) / 40, rel=0.1)


def test_solver_that_refuses_the_problem_has_a_row() -> None:
    bound = bl.BilevelProblem(
        CASE.problem.upper, CASE.problem.lower, lower_constraint=lambda x, y, data: y - 100.0
    )
    found = bl.compare(bound, {"implicit": SOLVERS["implicit"]}, *START, seconds=5.0)
    assert found.runs[0].status is None
    assert "lower_constraint" in found.runs[0].message
    assert "refused" in str(found)


def test_error_in_mid_run_is_no_refusal() -> None:
    """The objectives break after some steps: that is the user's to see, not the solver's refusal."""
    calls = itertools.count()

    def upper(x: torch.Tensor, y: torch.Tensor, data: object) -> torch.Tensor:
        if next(calls) > 40:
            raise ValueError("the file is gone")
        return CASE.problem.upper(x, y, data)

    broken = bl.BilevelProblem(upper, CASE.problem.lower)
    with pytest.raises(ValueError, match="the file is gone"):
        bl.compare(broken, {"unrolled": SOLVERS["unrolled"]}, *START, budget=10**5)
    assert next(calls) > 40


def test_seconds_are_kept_to_within_a_step() -> None:
    (run,) = bl.compare(CASE.problem, {"ASBLO": bl.ASBLO()}, *START, seconds=1e-6).runs
    assert len(run.costs) == 1


def test_plot_without_matplotlib_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = bl.compare(CASE.problem, SOLVERS, *START, budget=50)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        found.plot(tmp_path / "x.png")


def test_plot_draws_each_run_against_its_cost(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    drawn: dict[str, tuple[object, object]] = {}

    class Axes:
        def plot(self, x: object, y: object, label: str, **_: object) -> None:
            drawn[label] = x, y

        def __getattr__(self, name: str) -> object:
            return lambda *_, **__: None

    class Figure:
        def __init__(self, **_: object) -> None: ...

        def subplots(self) -> Axes:
            return Axes()

        def savefig(self, path: Path) -> None:
            path.write_text("drawn")

    module = types.ModuleType("matplotlib.figure")
    module.Figure = Figure  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", module)
    monkeypatch.setitem(sys.modules, "matplotlib", types.ModuleType("matplotlib"))
    found = bl.compare(CASE.problem, SOLVERS, *START, budget=50)
    found.plot(tmp_path / "x.png")
    assert (tmp_path / "x.png").exists()
    assert drawn == {run.name: (run.costs, run.values) for run in found.runs}


def test_plot_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    bl.compare(CASE.problem, SOLVERS, *START, budget=50).plot(tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_budgets_and_solvers_are_checked() -> None:
    with pytest.raises(ValueError, match="Got neither"):
        bl.compare(CASE.problem, SOLVERS, *START)
    with pytest.raises(ValueError, match="Got both"):
        bl.compare(CASE.problem, SOLVERS, *START, budget=5, seconds=1.0)
    with pytest.raises(ValueError, match="must be a finite number > 0"):
        bl.compare(CASE.problem, SOLVERS, *START, budget=0)
    with pytest.raises(ValueError, match="must hold a solver"):
        bl.compare(CASE.problem, {}, *START, budget=5)
    with pytest.raises(TypeError, match="must be an instance of `Solver`"):
        bl.compare(CASE.problem, {"a": bl.Implicit()}, *START, budget=5)  # pyright: ignore[reportArgumentType]
    assert torch.equal(START[0], CASE.x0)


class Ends(bl.Solver):
    """Says after its first step that it is done."""

    def init(self, problem: Any, x0: Any, y0: Any, data: Any, *, full_batch: bool) -> bl.State:
        return bl.State(x0, y0)

    def step(self, problem: Any, state: bl.State, data: Any) -> bl.State:
        return replace(state, step=state.step + 1, status=bl.Status.CONVERGED)


def test_solver_that_ends_in_its_first_step_has_a_row() -> None:
    (run,) = bl.compare(CASE.problem, {"ends": Ends()}, *START, budget=300).runs
    assert run.status is bl.Status.CONVERGED
    assert run.upper == pytest.approx(float(CASE.problem.upper(*START, None)))
    assert len(run.costs) == 1


def test_memory_is_printed_in_its_unit() -> None:
    (run,) = bl.compare(CASE.problem, {"ends": Ends()}, *START, budget=300).runs
    sizes = {1000: "1000 B", 3 << 10: "3 KiB", 5 << 20: "5 MiB", 7 << 30: "7 GiB"}
    for size, text in sizes.items():
        assert f"  {text}  " in str(bl.Comparison((replace(run, memory=size),), "none"))


def test_plot_leaves_out_a_solver_that_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    constrained = replace(CASE.problem, lower_constraint=lambda x, y, data: y - 100.0)
    solvers = {"refuses": bl.HypergradientDescent(bl.Implicit()), "ends": Ends()}
    found = bl.compare(constrained, solvers, *START, budget=1)
    assert [run.status for run in found.runs] == [None, bl.Status.CONVERGED]
    found.plot(tmp_path / "runs.svg")
    drawn = (tmp_path / "runs.svg").read_text()
    assert "<!-- ends -->" in drawn
    assert "<!-- refuses -->" not in drawn
