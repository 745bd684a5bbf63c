import numpy as np
import pytest
import torch
from export import Arguments as Exported
from export import export
from export import main as export_main
from model import EchoIR, EchoIRConfig
from onnx_network import OnnxNetwork, flatten, unflatten
from photographs import load_image
from restore import Arguments, main
from scenes import save, scene
from tiles import restore, restore_with
from weights import save_weights
from whole_image import Statistics

CPU = torch.device("cpu")
TINY = EchoIRConfig(width=8, blocks=(1, 1), heads=(1, 2), final_blocks=1, unshuffle=2)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A network, and the file it was exported to."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="of the extra `onnx`")
    torch.manual_seed(0)
    net = EchoIR(TINY).eval()
    path = tmp_path_factory.mktemp("onnx") / "weights.onnx"
    export(net, path, {"task": "denoise"})
    return net, path


pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),  # torch's own
]


@pytest.mark.parametrize("size", [(4, 4), (40, 56), (64, 96), (132, 20)])
def test_same_numbers_at_every_size(exported, size):
    net, path = exported
    image = torch.rand(1, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(OnnxNetwork(path)(image)[0], net(image), rtol=0, atol=1e-4)


@pytest.mark.parametrize("whole", [True, False])
def test_tiled_as_torch_does_it(exported, whole):
    net, path = exported
    image = torch.cat([torch.rand(3, 101, 60), torch.zeros(3, 101, 90)], 2)
    cuts = {"tile": 64, "overlap": 24, "multiple": TINY.multiple}
    ours = restore_with(OnnxNetwork(path), image, whole=whole, **cuts)
    statistics = "whole" if whole else "tile"
    expected = restore(net, image, device=CPU, statistics=statistics, **cuts)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


def test_restore_command_runs_it(exported, tmp_path):
    net, path = exported
    save_weights(tmp_path / "weights.safetensors", net, {})
    save(tmp_path / "in" / "a.png", scene(np.random.default_rng(0), 70, 50))
    results = []
    for weights in (path, tmp_path / "weights.safetensors"):
        out = tmp_path / weights.suffix
        main(Arguments((str(tmp_path / "in"),), out, weights, device="cpu", tile=48, overlap=16))
        results.append(load_image(out / "a.png").astype(int))
    assert np.abs(results[0] - results[1]).max() <= 1  # a rounding


def test_what_it_cannot_do(exported, tmp_path):
    save(tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="must run as it was exported"):
        main(Arguments((str(tmp_path / "a.png"),), tmp_path / "out", exported[1], amp=True))
    (tmp_path / "b.onnx").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"must be an ONNX file\. Got .*b\.onnx"):
        OnnxNetwork(tmp_path / "b.onnx")
    with pytest.raises(ValueError, match="does not exist"):
        OnnxNetwork(tmp_path / "absent.onnx")


@pytest.mark.parametrize("name", ["weights.txt", "folder.onnx"])
def test_an_output_that_restore_would_not_know_is_refused_before_the_work(name, tmp_path):
    (tmp_path / "folder.onnx").mkdir()
    save_weights(tmp_path / "weights.safetensors", EchoIR(TINY), {})
    with pytest.raises(ValueError, match=rf"whose name ends in \.onnx.* Got .*{name}"):
        export_main(Exported(tmp_path / "weights.safetensors", tmp_path / name))


def test_the_folder_of_the_output_is_made(tmp_path, monkeypatch):
    save_weights(tmp_path / "weights.safetensors", EchoIR(TINY), {})
    monkeypatch.setattr("export.export", lambda net, output, about: output.touch())
    monkeypatch.setattr("export.difference", lambda net, output: 0.0)
    output = tmp_path / "new" / "folder" / "weights.onnx"
    export_main(Exported(tmp_path / "weights.safetensors", output))
    assert output.is_file()


def test_statistics_as_one_vector():
    statistics = Statistics(torch.tensor(6.0), (torch.rand(1, 2, 3, 3), torch.rand(1, 4, 1, 1)))
    vector = flatten(statistics)
    assert vector.shape == (1 + 18 + 4,)
    back = unflatten(vector, [(1, 2, 3, 3), (1, 4, 1, 1)])
    torch.testing.assert_close((back.pixels, *back.sums), (statistics.pixels, *statistics.sums))
