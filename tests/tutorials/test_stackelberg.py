"""The game's closed form against brute force by SciPy, and ASBLO against the closed form."""

import numpy as np
import pytest
import stackelberg as game
import torch
from scipy.optimize import minimize

GAMES = {
    "one rival at capacity": {},
    "a small plant": {"PLANT": 2.5},
    "an expensive rival stays idle": {"COSTS": torch.tensor([1.0, 2.0, 7.0]).double()},
    "all at capacity": {"CAPACITY": torch.tensor([0.3, 0.4, 0.5]).double()},
}


@pytest.fixture(params=list(GAMES), autouse=True)
def _game(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in GAMES[request.param].items():
        monkeypatch.setattr(game, name, value)


def by_scipy(x: float) -> np.ndarray:
    """The minimum of the potential, by SciPy."""

    def potential(y: np.ndarray) -> float:
        return float(game.potential(torch.tensor([x]).double(), torch.as_tensor(y)))

    bounds = [(0.0, float(c)) for c in game.CAPACITY]
    return minimize(potential, np.zeros(3), bounds=bounds, options={"ftol": 1e-15, "gtol": 1e-9}).x


@pytest.mark.parametrize("x", [0.0, 1.0, 3.5, 6.0])
def test_equilibrium_minimizes_the_potential(x: float) -> None:
    np.testing.assert_allclose(game.equilibrium(x), by_scipy(x), atol=1e-5)


@pytest.mark.parametrize("x", [0.5, 4.0])
def test_no_rival_gains_alone_at_the_equilibrium(x: float) -> None:
    y = game.equilibrium(x)
    for i, (cost, capacity) in enumerate(zip(game.COSTS, game.CAPACITY, strict=True)):
        outputs = torch.linspace(0.0, float(capacity), 1001, dtype=torch.float64)
        others = y.sum() - y[i]
        profits = outputs * (game.PRICE - x - others - outputs - cost)
        own = y[i] * (game.PRICE - x - y.sum() - cost)
        assert float(profits.max()) <= float(own) + 1e-9


def test_optimum_is_the_best_of_a_grid() -> None:
    x, profit = game.optimum()
    grid = np.linspace(0.0, game.PLANT, 401)
    profits = [
        float(game.leader_profit(torch.tensor([g]).double(), game.equilibrium(g))) for g in grid
    ]
    assert profit >= max(profits) - 1e-12
    assert profit == pytest.approx(max(profits), abs=5e-3)
    assert 0.0 <= x <= game.PLANT


def test_asblo_finds_the_closed_form() -> None:
    x, profit = game.optimum()
    problem = game.play()
    assert -problem.upper == pytest.approx(profit, abs=1e-4)
    assert float(problem.x) == pytest.approx(x, abs=1e-3)
    np.testing.assert_allclose(problem.y, game.equilibrium(x), atol=1e-3)
    leader, _ = game.drawing(problem).axes
    curve, found = leader.lines
    assert np.max(curve.get_ydata()) == pytest.approx(profit, abs=5e-3)
    np.testing.assert_array_equal(found.get_ydata(), [-problem.upper])
