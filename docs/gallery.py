"""Makes the gallery of the EchoIR page: photographs with noise, and what the example's denoiser makes of them.

    python docs/gallery.py

No photograph was trained on. The noise, sigma 25, is clipped and rounded as a file holds it.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "echoir"))

from noise import noise
from photographs import bundled
from scores import channels_first
from weights import DENOISER, load_weights

HEIGHT, WIDTH = 288, 384
QUALITY = 90  # of WebP; the noise is what costs


def main() -> None:
    net, _ = load_weights(DENOISER, torch.device("cpu"))
    folder = Path(__file__).parent / "assets" / "gallery"
    folder.mkdir(exist_ok=True)
    for photograph in bundled().test:
        image = photograph.read().target
        top, left = (image.shape[0] - HEIGHT) // 2, (image.shape[1] - WIDTH) // 2
        clean = image[top : top + HEIGHT, left : left + WIDTH].astype(np.float32) / 255
        noisy = noise(clean, np.random.default_rng(0), 25.0)
        before = (noisy.clip(0, 1) * 255).round().astype(np.uint8)
        tensor = channels_first(before) / 255
        with torch.no_grad():
            restored = net(tensor[None])[0].clamp(0, 1).permute(1, 2, 0).numpy()
        after = (restored * 255).round().astype(np.uint8)
        for name, pixels in (("noisy", before), ("restored", after)):
            path = folder / f"{photograph.name}-{name}.webp"
            Image.fromarray(pixels).save(path, quality=QUALITY)


if __name__ == "__main__":
    main()
