import pytest
import torch
from arguments import CONFIGS, PAPER, Arguments, check, defaults
from methods import training_runs
from model import EchoIR, EchoIRConfig
from photographs import Photograph, Split
from stages import Stage, learning_rate, plan
from train import command_line, restorer

CPU = torch.device("cpu")


def planned(a):
    return plan(a.stages, a.steps, patch=a.patch, batch=a.batch, lower_batch=a.lower_batch)


def test_the_papers_stages_step_by_step():
    stages = planned(PAPER)
    assert sum(PAPER.stages) == 300_000
    borders = (92_000, 156_000, 204_000, 240_000, 276_000)
    assert stages.ends == borders
    assert [stages.at(step).patch for step in (0, 91_999, 92_000, 155_999, 156_000)] == [
        144,
        144,
        160,
        160,
        192,
    ]
    assert stages.at(203_999) == Stage(192, 4, 4)
    assert stages.at(204_000) == Stage(224, 2, 2)
    assert stages.at(275_999) == Stage(320, 1, 1)
    assert stages.at(276_000) == stages.at(299_999) == stages.at(10**9) == Stage(336, 1, 1)


def test_another_number_of_steps_keeps_the_shares():
    stages = plan((2, 1, 1), 400, patch=(8, 16, 24), batch=3, lower_batch=(3, 2, 1))
    assert stages.ends == (200, 300)
    assert [stages.at(step) for step in (199, 200, 300)] == [
        Stage(8, 3, 3),
        Stage(16, 3, 2),
        Stage(24, 3, 1),
    ]
    assert plan((), None, patch=8, batch=2, lower_batch=1).at(12345) == Stage(8, 2, 1)


def test_small_has_the_shape_of_the_paper():
    paper, small = CONFIGS["paper"], CONFIGS["small"]
    assert [100 * length for length in small.stages] == list(paper.stages)
    assert small.batch == paper.batch
    assert list(small.patch) == sorted(small.patch)
    for big, little in zip(paper.patch, small.patch, strict=True):
        assert little % 8 == 0
        assert abs(little - big / 3) < 8
    assert small.hold == paper.hold


def test_the_papers_learning_rate():
    a = CONFIGS["paper"]
    lr = learning_rate(a.lr, a.lr_end, lambda k: k / 300_000, warmup=a.warmup, hold=a.hold)
    assert lr(0) == lr(92_000) == 3e-4
    assert lr(92_001) < 3e-4
    assert lr(196_000) == pytest.approx((3e-4 + 1e-6) / 2)  # half the cosine
    assert lr(300_000) == pytest.approx(1e-6)


def test_the_usual_learning_rate_is_what_it_was():
    """Fifty steps up, then half a cosine down to a hundredth: to the last bit."""
    import math

    lr = learning_rate(2e-3, 2e-3 / 100, lambda k: k / 1000, warmup=50)
    for step in (0, 10, 49, 50, 500, 999):
        rise = min(1.0, (step + 1) / 50)
        expected = 2e-3 * rise * (0.505 + 0.495 * math.cos(math.pi * step / 1000))
        assert lr(step) == pytest.approx(expected, rel=1e-15)


def test_a_configuration_is_overridden_by_further_arguments():
    assert defaults(["--steps", "5"]) == Arguments()
    assert defaults(["--config", "paper", "--steps", "5"]) == PAPER
    assert defaults(["--config=small"]) == CONFIGS["small"]
    for config in CONFIGS.values():
        check(config)


def test_batches_follow_the_stages():
    image = (torch.rand(70, 80, 3, generator=torch.Generator().manual_seed(0)) * 255).byte().numpy()
    photographs = tuple(Photograph(name, image) for name in "ab")
    data = Split(photographs[:1], photographs[1:], photographs[:1])
    a = Arguments(stages=(2, 1), steps=30, patch=(16, 24), batch=(3, 2), lower_batch=(2, 1))
    torch.manual_seed(0)
    net = EchoIR(EchoIRConfig(width=8, blocks=(1, 1), heads=(1, 2), final_blocks=1))
    runs = training_runs(
        a,
        ("asblo", "single-level"),
        data,
        net,
        CPU,
        restored=restorer(a, data, net, CPU),
        keep=lambda *_: None,
    )
    before, after = runs["asblo"].batch(19), runs["asblo"].batch(20)
    assert before.upper.input.shape == (3, 3, 16, 16)
    assert before.lower.input.shape == (2, 3, 16, 16)
    assert after.upper.input.shape == (2, 3, 24, 24)
    assert after.lower.input.shape == (1, 3, 24, 24)
    assert runs["single-level"].batch(20).upper.input.shape == (2, 3, 24, 24)
    assert torch.equal(after.upper.input, runs["asblo"].batch(20).upper.input)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stages", "5", "5", "--patch", "16", "24", "32"], "one for each of the 2 stages"),
        (["--patch", "16", "24"], "one for each of the 0 stages"),
        (["--stages", "5", "0"], "`--stages` must be positive"),
        (["--config", "huge"], "huge"),
        (["--hold", "1"], r"`--hold` must be at least 0 and below 1. Got 1.0"),
        (["--ema", "-0.1"], "`--ema` must be at least 0"),
        (["--warmup", "-1"], "`--warmup` must be at least 0"),
        (["--mu", "0", "2", "100"], "`--mu` must have a start and a scale above 0"),
    ],
)
def test_mistakes_are_told_in_a_sentence(folder, tmp_path, options, message, capsys):
    with pytest.raises(SystemExit) as left:
        command_line(["--data", str(folder), "--output", str(tmp_path / "out"), *options])
    assert left.value.code == 2
    captured = capsys.readouterr()
    assert message in " ".join((captured.err + captured.out).split())
