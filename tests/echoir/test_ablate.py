import json
import os
import signal
import statistics

import lab
import pytest
import torch
from ablate import SCALES, Arguments, command_line, scaled, trainings
from ablation_table import Row, markdown, reach, spread
from arguments import CONFIGS
from methods import METHODS
from model import PRESETS, count
from timing import take_turns
from variants import COLUMNS, variants


def words(which, folder, output, *options):
    tiny = ["--train.patch", "16", "--train.batch", "1", "--train.lower-batch", "1"]
    fixed = ["--train.data", folder, "--output", output, "--train.device", "cpu", "--steps", "2"]
    return [which, *map(str, (*fixed, "--minutes", "0.001", *tiny, *options))]


def few(monkeypatch, rows):
    """Only so many variants, which are timed for a few steps."""
    monkeypatch.setattr("ablate.variants", lambda *a: variants(*a)[:rows])
    monkeypatch.setattr(lab, "TIMED", 2)


@pytest.mark.parametrize(("which", "rows"), [("upsampler", 6), ("block", 4), ("strategy", 12)])
def test_rows_are_distinct_and_labeled(which, rows):
    all_rows = variants(which, "asblo")
    assert len({variant.name for variant in all_rows}) == rows
    assert all(len(variant.labels) == len(COLUMNS[which]) for variant in all_rows)
    assert len({(str(variant.net), variant.method) for variant in all_rows}) == rows


def test_strategies_are_single_level_asblo_and_two_others():
    methods = {variant.method for variant in variants("strategy", "asblo")}
    assert methods == set(METHODS)
    assert {"single-level", "asblo"} < methods
    assert len(methods) == 4


def test_a_table_of_all_upsamplers(folder, tmp_path, monkeypatch, capsys):
    few(monkeypatch, 6)
    command_line(words("upsampler", folder, tmp_path, "--seeds", "1"))
    table = (tmp_path / "upsampler" / "table.md").read_text()
    assert table in capsys.readouterr().out
    head, _, *lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()
    ]
    assert head[:4] == ["upsampler", "parameters", "GFLOPs", "s a step"]
    assert head[4:6] == ["PSNR, SSIM after 2 steps", "PSNR, SSIM after 0.001 minutes"]
    known = json.loads((tmp_path / "upsampler" / "results.json").read_text())
    assert len(lines) == len(known["costs"]) == 6
    for line, variant in zip(lines, variants("upsampler", "asblo"), strict=True):
        counts = count(lab.replace(PRESETS["cpu"], **variant.net))
        assert line[:2] == [*variant.labels, f"{counts['parameters']:,}"]
        assert float(line[2]) == pytest.approx(counts["flops"] / 1e9, abs=1e-3)
        (run,) = (r for r in known["runs"] if (r["variant"], r["steps"]) == (variant.name, 2))
        assert line[4] == f"{run['psnr_rgb']:.2f} dB, {run['ssim']:.3f}"
        assert run["psnr_rgb"] > 5


def test_it_goes_on_where_it_stopped(folder, tmp_path, monkeypatch):
    """Stopped in the middle of a training, it repeats none that is finished, and ends with the same figures."""
    import run

    few(monkeypatch, 2)
    monkeypatch.setattr(lab, "take_turns", lambda steps, n, _: [[0.02] * n for _ in steps])
    options = ["--steps", "4", "--seeds", "2"]  # after which 3 steps fit into 0.06 s
    command_line(words("block", folder, tmp_path / "straight", *options))
    made = []

    def stop(average, state, decay, original=run._average):
        made.append(state.step)
        if len(made) == 3 + 4 + 2:  # in the third training
            os.kill(os.getpid(), signal.SIGINT)
        original(average, state, decay)

    with monkeypatch.context() as patch:
        patch.setattr(run, "_average", stop)
        with pytest.raises(SystemExit) as left:
            command_line(words("block", folder, tmp_path / "broken", *options))
        assert left.value.code == 75
        begun = json.loads((tmp_path / "broken" / "block" / "results.json").read_text())["runs"]
        assert len(begun) == 2
        command_line(words("block", folder, tmp_path / "broken", *options))
        assert len(made) == 2 * 2 * (3 + 4)  # none was made twice
        command_line(words("block", folder, tmp_path / "broken", *options))
        assert len(made) == 2 * 2 * (3 + 4)
    known = [
        json.loads((tmp_path / name / "block" / "results.json").read_text())["runs"]
        for name in ("straight", "broken")
    ]
    for runs in known:
        for training in runs:
            del training["seconds"]
    assert known[0] == known[1]
    tables = [(tmp_path / n / "block" / "table.md").read_text() for n in ("straight", "broken")]
    assert tables[0] == tables[1]
    assert "±" in tables[0]


def test_other_settings_need_another_folder(folder, tmp_path, monkeypatch, capsys):
    few(monkeypatch, 1)
    command_line(words("block", folder, tmp_path, "--seeds", "1"))
    with pytest.raises(SystemExit) as left:
        command_line(words("block", folder, tmp_path, "--train.lr", "1e-4"))
    assert left.value.code == 2
    assert "train.lr=0.0001 after 0.002" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("content", ["{", "{}", "[]"])
def test_damaged_results_are_named(content, tmp_path):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match=r"Got .*results\.json, which is damaged"):
        lab.Results(tmp_path / "results.json", {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "`--steps` must be positive and finite. Got 0. Use e.g. 500"),
        (["--minutes", "nan"], "`--minutes` must be positive and finite. Got nan"),
        (["--seeds", "0"], "`--seeds` must be positive and finite. Got 0. Use e.g. 3"),
        (["--train.steps", "7"], "`--train.steps` must be left to the ablation"),
        (["--train.lr", "0"], "`--lr` must be positive"),
    ],
)
def test_mistakes_are_told_in_a_sentence(folder, tmp_path, options, message, capsys):
    with pytest.raises(SystemExit) as left:
        command_line(words("block", folder, tmp_path, *options))
    assert left.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_the_papers_protocol_can_be_ablated():
    a = scaled(Arguments("strategy", steps=100_000, train=CONFIGS["paper"]))
    assert (a.train.steps, a.train.preset, len(a.train.stages)) == (100_000, "paper", 6)
    assert a.minutes == SCALES["strategy"][1]


def test_a_training_whose_budgets_agree_is_made_once():
    rows = variants("block", "asblo")[:2]
    budgets = {rows[0].name: (5, 5), rows[1].name: (5, 7)}
    assert [(v.name, s, n) for v, s, n in trainings(rows, 1, budgets)] == [
        (rows[0].name, 0, 5),
        (rows[1].name, 0, 5),
        (rows[1].name, 0, 7),
    ]


def test_figures_of_the_table():
    runs = [{"psnr_rgb": p, "ssim": s} for p, s in ((30.0, 0.8), (30.2, 0.9), (30.7, 0.82))]
    psnr, ssim = (statistics.stdev(r[k] for r in runs) for k in ("psnr_rgb", "ssim"))
    assert reach(runs) == f"30.30 ± {psnr:.2f} dB, 0.840 ± {ssim:.3f}"
    assert reach([*runs[:1], {"diverged": "at step 3"}]) == "30.00 dB, 0.800; 1 of 2 diverged"
    assert reach([]) == ""
    assert spread([1.0], 1) == "1.0"
    row = Row(("a",), 12345, 5_490_000_000, 0.0601, (400, 741), (runs, runs[:2]))
    last = markdown(["net"], [row], 0.75).splitlines()[-1]
    assert last.startswith("| a | 12,345 | 5.490 | 0.060 | 30.30 ±")
    assert last.endswith("| 741 | 2 |")


def test_turns_are_taken():
    order = []
    seconds = take_turns(
        [lambda: order.append("a"), lambda: order.append("b")], 3, torch.device("cpu")
    )
    assert "".join(order) == "ababab"
    assert [len(times) for times in seconds] == [3, 3]
    assert min(min(times) for times in seconds) >= 0
