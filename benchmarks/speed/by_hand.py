"""The floor: what one would write in plain torch, with no library at all."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import grad

from speed.work import Answer, Hypergradient, Lower, Work


def implicit(work: Work, steps: int, rtol: float, products: int) -> Hypergradient:
    """`steps` of gradient descent on y, a single tensor, then conjugate gradients for the linear system."""

    def hypergradient(x: Tensor, start: Lower) -> Answer:
        (y,) = start
        velocity = None
        for _ in range(steps):
            y = y.detach().requires_grad_(True)
            (g,) = grad(work.lower(x, y), y)
            if work.momentum:
                velocity = g if velocity is None else torch.add(g, velocity, alpha=work.momentum)
                g = velocity
            y = torch.sub(y.detach(), g, alpha=work.lr)
        x, y = x.detach().requires_grad_(True), y.requires_grad_(True)
        by_x, b = grad(work.upper(x, y), (x, y), allow_unused=True, materialize_grads=True)
        (g,) = grad(work.lower(x, y), y, create_graph=True)
        v, r, p, rr, count = torch.zeros_like(b), b, b, float(b @ b), 0
        least = rtol**2 * rr
        while rr > least and count < products:
            (Ap,) = grad(g, y, p, retain_graph=True)
            count += 1
            alpha = rr / float(p @ Ap)
            v, r = torch.add(v, p, alpha=alpha), torch.sub(r, Ap, alpha=alpha)
            rr, before = float(r @ r), rr
            p = torch.add(r, p, alpha=rr / before)
        (mixed,) = grad(g, x, v)
        return Answer(by_x - mixed, (y.detach(),), steps + 2, count + 1)

    return hypergradient


def unrolled(work: Work, steps: int) -> Hypergradient:
    """Autograd through all `steps` of gradient descent, whose graph it keeps."""

    def hypergradient(x: Tensor, start: Lower) -> Answer:
        x = x.detach().requires_grad_(True)
        y = [leaf.detach().requires_grad_(True) for leaf in start]
        velocity = None
        for _ in range(steps):
            g = grad(work.lower(x, *y), y, create_graph=True)
            if work.momentum:
                if velocity is not None:
                    pairs = zip(g, velocity, strict=True)
                    g = [torch.add(a, v, alpha=work.momentum) for a, v in pairs]
                velocity = g
            y = [torch.sub(leaf, a, alpha=work.lr) for leaf, a in zip(y, g, strict=True)]
        (by_x,) = grad(work.upper(x, *y), x)
        return Answer(by_x, tuple(leaf.detach() for leaf in y), steps + 1, 2 * steps)

    return hypergradient


def recomputed(work: Work, steps: int) -> Hypergradient:
    """The same numbers without momentum: the iterates are kept, and the graph of each step is built again."""

    def hypergradient(x: Tensor, start: Lower) -> Answer:
        x = x.detach()
        y, kept = list(start), list[list[Tensor]]()
        for _ in range(steps):
            kept.append(y)
            leaves = [leaf.detach().requires_grad_(True) for leaf in y]
            g = grad(work.lower(x, *leaves), leaves)
            y = [torch.sub(leaf, a, alpha=work.lr) for leaf, a in zip(y, g, strict=True)]
        x = x.requires_grad_(True)
        leaves = [leaf.detach().requires_grad_(True) for leaf in y]
        by_x, *w = grad(
            work.upper(x, *leaves), (x, *leaves), allow_unused=True, materialize_grads=True
        )
        while kept:
            leaves = [leaf.detach().requires_grad_(True) for leaf in kept.pop()]
            g = grad(work.lower(x, *leaves), leaves, create_graph=True)
            mixed, *products = grad(g, (x, *leaves), w)
            by_x = torch.sub(by_x, mixed, alpha=work.lr)
            w = [torch.sub(a, p, alpha=work.lr) for a, p in zip(w, products, strict=True)]
        return Answer(by_x, tuple(y), 2 * steps + 1, 2 * steps)

    return hypergradient
