"""What needs an NVIDIA GPU: skipped, with the reason, where there is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from skimage import data

import clip_export


@pytest.mark.gpu
def test_cuda_gives_what_the_cpu_gives(tiny_bundle: Path) -> None:
    texts, images = ["a red circle", "two blue squares", ""], [data.astronaut(), data.coffee()]
    with clip_export.load(tiny_bundle) as cpu, clip_export.load(tiny_bundle, device="cuda:0") as gpu:
        np.testing.assert_allclose(gpu.encode_text(texts), cpu.encode_text(texts), atol=1e-5)
        np.testing.assert_allclose(gpu.encode_image(images), cpu.encode_image(images), atol=1e-5)
    assert clip_export.verify(tiny_bundle, device="cuda:0").passed
