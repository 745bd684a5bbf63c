"""A Stackelberg game with capacities: a leader that sets its output before its rivals set theirs.

    python docs/tutorials/stackelberg.py          # a few seconds; writes stackelberg.svg

N rivals (followers) and a leader sell one good. The price is PRICE minus all that is produced, the leader
produces x at UNIT_COST, and rival i produces y_i at COSTS[i], at most CAPACITY[i]. Once x is known, the
rivals are in Cournot equilibrium: each maximizes its profit given the outputs of the others. This game has a
potential, so that the equilibrium is the minimizer of one convex function under the rivals' capacities:

    max_x  x (price(x, y) - UNIT_COST)   subject to   y = argmin potential(x, y),  0 <= y <= CAPACITY,  0 <= x <= PLANT.

There is a closed form to compare with: at the equilibrium y_i = clip(PRICE - x - Y - COSTS[i], 0, CAPACITY[i]), where Y
is the sum of all y, one equation in one unknown; between the outputs at which a rival meets one of its bounds,
the leader's profit is a parabola in x. So the capacities make kinks in the profit, and an optimum may sit on one.
"""

import itertools
from pathlib import Path

import torch
from matplotlib.figure import Figure
from plots import legend, panels, save
from torch import Tensor

import bilevel as bl

PRICE = 10.0  # of the first unit
UNIT_COST = 2.0  # of the leader
PLANT = 8.0  # the leader's own capacity
COSTS = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
CAPACITY = torch.tensor([1.0, 2.0, 2.0], dtype=torch.float64)


def leader_profit(x: Tensor, y: Tensor) -> Tensor:
    """0-d, for x of shape (1,)."""
    return (x * (PRICE - x - y.sum() - UNIT_COST)).sum()


def potential(x: Tensor, y: Tensor) -> Tensor:
    """Whose gradient in y_i is minus the marginal profit of rival i: PRICE - x - Y - y_i - COSTS[i]."""
    return 0.5 * (y**2).sum() + 0.5 * y.sum() ** 2 - (y * (PRICE - x - COSTS)).sum()


def capacities(x: Tensor, y: Tensor, data: None) -> Tensor:
    """Feasible where nonpositive, shape (6,)."""
    return torch.cat([-y, y - CAPACITY])


def game() -> bl.BilevelProblem:
    """The leader as the upper level, its rivals as the lower one."""
    return bl.BilevelProblem(
        upper=lambda x, y, data: -leader_profit(x, y),
        lower=lambda x, y, data: potential(x, y),
        lower_constraint=capacities,
        domain=bl.Box(0.0, PLANT),
    )


def equilibrium(x: float) -> Tensor:
    """The rivals' outputs by bisection of the one equation for their sum, shape (3,)."""
    low, high = 0.0, float(CAPACITY.sum())

    def answers(total: float) -> Tensor:
        return (PRICE - x - total - COSTS).clamp(min=0.0).minimum(CAPACITY)

    for _ in range(100):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if float(answers(middle).sum()) > middle else (low, middle)
    return answers(0.5 * (low + high))


def optimum() -> tuple[float, float]:
    r"""The leader's best output and its profit, from the pieces of the game.

    Where the rivals in the set A are free, those in C at capacity and the others at zero, $y_i = p - c_i$ in A with
    the price $p = (P - x - \sum_C \bar y_i + \sum_A c_i) / (1 + |A|)$, so that the profit $x (p - c)$ is largest at
    $x = (P - \sum_C \bar y_i + \sum_A c_i - (1 + |A|) c) / 2$, or on the border of the piece.
    """
    candidates = [0.0, PLANT]
    for sides in itertools.product(("zero", "free", "full"), repeat=len(COSTS)):
        free = torch.tensor([side == "free" for side in sides])
        full = torch.tensor([side == "full" for side in sides])
        height = PRICE - float(CAPACITY[full].sum()) + float(COSTS[free].sum())
        share = 1 + int(free.sum())
        candidates.append(0.5 * (height - share * UNIT_COST))
        kinks = torch.cat([COSTS, COSTS + CAPACITY])  # prices at which a rival meets a bound
        candidates += (height - share * kinks).tolist()
    inside = [x for x in candidates if 0.0 <= x <= PLANT]
    profits = [float(leader_profit(torch.tensor([x]).double(), equilibrium(x))) for x in inside]
    best = max(range(len(inside)), key=profits.__getitem__)
    return inside[best], profits[best]


def play(x0: float = 1.0, solver: bl.Solver | None = None) -> bl.Solution:
    """The game, solved by ASBLO from the output `x0` and idle rivals."""
    start = torch.full((1,), x0, dtype=torch.float64)
    return bl.solve(game(), solver or bl.ASBLO(), start, 0.5 * CAPACITY, max_steps=500)


def drawing(solution: bl.Solution) -> Figure:
    """The leader's profit and the rivals' outputs against the leader's output."""
    outputs = torch.linspace(0.0, PLANT, 201, dtype=torch.float64)
    rivals = torch.stack([equilibrium(float(x)) for x in outputs])
    profits = [float(leader_profit(x[None], y)) for x, y in zip(outputs, rivals, strict=True)]
    figure, (leader, others) = panels(2)
    leader.plot(outputs, profits, color="black", label="leader")
    leader.plot(solution.x, -solution.upper, "o", color="tab:red", label="ASBLO")
    for i, output in enumerate(rivals.T):
        (line,) = others.plot(outputs, output, label=f"rival {i + 1}")
        others.plot(solution.x, solution.y[i], "o", color=line.get_color())
    leader.set(title="The leader's profit", xlabel="leader's output", ylabel="profit")
    others.set(title="Its rivals", xlabel="leader's output", ylabel="output")
    legend(figure, columns=5)
    return figure


def main(output: Path = Path("stackelberg.svg")) -> None:
    """Plays the game, prints it beside the closed form, and draws it."""
    solution = play()
    x, profit = optimum()
    print(solution)
    print(solution.certificate)
    print(f"output {float(solution.x):.6f} (closed form {x:.6f})")
    print(f"profit {-solution.upper:.6f} (closed form {profit:.6f})")
    print(f"rivals {solution.y.tolist()} (closed form {equilibrium(x).tolist()})")
    save(drawing(solution), output)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
