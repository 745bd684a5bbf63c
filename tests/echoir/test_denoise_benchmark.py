"""The crops on which benchmarks/denoise.py compares denoisers."""

import sys

import numpy as np
import pytest
from scenes import EXAMPLE, save, scene

sys.path.insert(0, str(EXAMPLE.parents[1] / "benchmarks"))

import denoise


def test_photographs_smaller_than_a_crop_are_told(tmp_path, capsys):
    rng = np.random.default_rng(0)
    save(tmp_path / "large.png", scene(rng, 260, 520))
    save(tmp_path / "small.png", scene(rng, 255, 300))
    (tmp_path / "notes.txt").touch()
    found = denoise.crops(denoise.Arguments(data=tmp_path))
    assert [crop.shape for crop in found] == 2 * [(256, 256, 3)]
    assert "left out: 1 photographs smaller than 256 x 256" in capsys.readouterr().out


def test_no_crops_at_all_are_refused(folder):
    with pytest.raises(ValueError, match=r"crops of 256 x 256.* Got 5 photographs, 5 of them smal"):
        denoise.crops(denoise.Arguments(data=folder))
    with pytest.raises(ValueError, match=r"Got 3 photographs, 0 .* --per-photograph 0\. "):
        denoise.crops(denoise.Arguments(per_photograph=0))
