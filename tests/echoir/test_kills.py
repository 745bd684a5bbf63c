import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from checkpoint import load as load_checkpoint
from safetensors import safe_open
from torch.utils._pytree import tree_flatten
from weights import load_weights

KILLS = int(os.environ.get("KILLS", "20"))  # `make kills` does 200
STEPS = 12
LOGGED = [3, 6, 9, 10, 12]  # every third step, every tenth, and the last
CPU = torch.device("cpu")


def weights(path):
    """Their digest, which loading has checked, and what is known of them but the time."""
    about = load_weights(path, CPU)[1]
    about.pop("seconds", None)
    with safe_open(path, "pt") as file:
        return file.metadata()["sha256"], about


def contents(state):
    """Everything in a state, to the last bit."""
    leaves, _ = tree_flatten(vars(state))
    return [
        (t.dtype, t.shape, sha256(t.numpy().tobytes()).digest()) if torch.is_tensor(t) else t
        for t in leaves
    ]


def result(output):
    """All that a run has made, without times."""
    folders = (output, output / "asblo")
    files = [f / f"{name}.safetensors" for f in folders for name in ("weights", "best")]
    logs = "".join((folder / "metrics.jsonl").read_text() for folder in folders)
    rows = [json.loads(line) for line in logs.splitlines()]
    last = load_checkpoint(output / "asblo" / "checkpoints", CPU)
    assert last.finished
    return {
        "weights": [weights(file) for file in files],
        "log": [{k: v for k, v in row.items() if "seconds" not in k} for row in rows],
        "state": contents(last.state),
        "average": contents(last.average),
    }


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the children are forked")
def test_random_kills_change_no_bit(folder, tmp_path):
    """SIGKILL at random moments, half of them between two file operations, resumed each time.

    By --steps: the learning rate of a run by --minutes follows the clock, so no two of those are equal.
    """
    words = [sys.executable, Path(__file__).with_name("kills.py"), folder, tmp_path, STEPS, KILLS]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    died = json.loads(done.stdout.splitlines()[-1])
    assert len(died) == KILLS
    assert any(0 < kill["step"] < STEPS for kill in died)  # else none came in the middle
    unharmed = result(tmp_path / "unharmed")
    assert [row["step"] for row in unharmed["log"]] == 2 * LOGGED
    for run in {kill["run"] for kill in died}:
        killed = result(tmp_path / f"killed-{run}")
        for part, expected in unharmed.items():
            same = killed[part] == expected
            assert same, (part, died)
    middle = sum(0 < kill["step"] < STEPS for kill in died)
    runs = 1 + max(kill["run"] for kill in died)
    print(
        f"{len(died)} kills of {runs} runs, {middle} between the first step and the last: no bit differs"
    )
