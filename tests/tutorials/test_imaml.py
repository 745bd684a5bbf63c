"""The few-shot tutorial: its hypergradient against central differences, and a short meta-training."""

import itertools

import imaml
import numpy as np
import pytest
import torch

import bilevel as bl


@pytest.fixture(scope="module")
def images() -> list[torch.Tensor]:
    return imaml.by_class()


def test_turns_are_eight_different_images(images: list[torch.Tensor]) -> None:
    all_of_them = {tuple(imaml.turned(images[2][0], turn).flatten().tolist()) for turn in range(8)}
    assert len(all_of_them) == imaml.TURNS


def test_tasks_keep_support_and_queries_apart(images: list[torch.Tensor]) -> None:
    tasks = imaml.draw(images, imaml.UNSEEN, 4, torch.Generator().manual_seed(0))
    assert tasks.lower.images.shape == (4, imaml.WAYS * imaml.SHOTS, imaml.CANVAS**2)
    assert tasks.upper.labels.shape == (4, imaml.WAYS * imaml.QUERIES)
    assert (tasks.lower.labels.sum(1) == sum(range(imaml.WAYS)) * imaml.SHOTS).all()


def test_hypergradient_agrees_with_central_differences(
    images: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imaml, "HIDDEN", 3)
    generator = torch.Generator().manual_seed(0)
    tasks = imaml.draw(images, imaml.KNOWN, 1, generator)
    x = {k: v.double() for k, v in imaml.plain_start(generator).items()}
    x["head"] = 0.1 * torch.randn(x["head"].shape, generator=generator).double()
    exact = bl.Implicit(minimizer=bl.optim.Newton(dense_limit=0), tol=1e-11)
    monkeypatch.setattr(imaml, "METHOD", exact)
    tasks = bl.Batch(
        *(imaml.Tasks(part.images.double(), part.labels) for part in (tasks.upper, tasks.lower))
    )
    grad = imaml.estimate(x, tasks, 1.0).grad
    # A step that is the same for all classes would change nothing: the softmax does not see it.
    step = 1e-4 * torch.randn(x["head"].shape, generator=generator).double()
    ends = [
        imaml.estimate({**x, "head": x["head"] + s * step}, tasks, 1.0).value for s in (1.0, -1.0)
    ]
    assert float((grad["head"] * step).sum()) == pytest.approx((ends[0] - ends[1]) / 2.0, rel=1e-4)


def test_meta_training_helps_on_unseen_digits(images: list[torch.Tensor]) -> None:
    generator = torch.Generator().manual_seed(1)
    unseen = imaml.draw(images, imaml.UNSEEN, 30, torch.Generator().manual_seed(3), turns=1)
    plain = imaml.plain_start(generator)
    *_, trained = itertools.islice(imaml.meta_train(plain, images, generator), 15)
    before, after = (imaml.accuracy(x, unseen, imaml.STRENGTH) for x in (plain, trained))
    assert after > before + 0.01
    (axes,) = imaml.drawing([(0.0, before), (15.0, after)], {"a": 0.6, "b": 0.7}).axes
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), [before, after])


def test_pretraining_moves_the_hidden_layer_alone(images: list[torch.Tensor]) -> None:
    start = imaml.pretrain(images, 3, torch.Generator().manual_seed(0))
    assert start["head"].shape == (imaml.HIDDEN + 1, imaml.WAYS)
    assert not start["head"].any()
    assert not torch.equal(
        start["hidden"], imaml.plain_start(torch.Generator().manual_seed(0), 48)["hidden"]
    )
