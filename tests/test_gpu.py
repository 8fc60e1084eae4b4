"""What needs an NVIDIA GPU: skipped, with the reason, where there is none."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from skimage import data

import clip_export
from clip_export import backends
from clip_export.backends.onnxruntime import OnnxRuntimeEngine
from clip_export.bundle import Bundle
from clip_export.spec import Tower

pytestmark = pytest.mark.gpu

TEXTS = ["a red circle", "two blue squares", ""]
TOWERS: tuple[Tower, ...] = ("text", "image")


@pytest.fixture(scope="module")
def both(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny bundle with fp16 graphs in it."""
    path = tmp_path_factory.mktemp("bundles") / "both"
    shutil.copytree(tiny_bundle, path)
    return clip_export.extend(path, precision="fp16")


def engine_of(bundle: Bundle, tower: Tower, precision: str, **options: object) -> OnnxRuntimeEngine:
    path = bundle.graph_path(tower, precision)
    return cast(OnnxRuntimeEngine, backends.open_engine("onnxruntime", path, device="cuda:0", options=options))


def golden_feeds(bundle: Bundle, tower: Tower) -> dict[str, np.ndarray]:
    golden = bundle.golden()
    if tower == "image":
        assert golden.image is not None
        return {"pixels": golden.image.pixels}
    assert golden.text is not None
    return {"input_ids": golden.text.input_ids, "eot_index": golden.text.eot_index}


def rows_cosine(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return (first * second).sum(axis=1, dtype=np.float64) / lengths


def test_cuda_gives_what_the_cpu_gives(tiny_bundle: Path) -> None:
    images = [data.astronaut(), data.coffee()]
    with (
        clip_export.load(tiny_bundle, device="cpu") as cpu,
        clip_export.load(tiny_bundle, backend="onnxruntime", device="cuda:0") as gpu,
    ):
        np.testing.assert_allclose(gpu.encode_text(TEXTS), cpu.encode_text(TEXTS), atol=1e-5)
        np.testing.assert_allclose(gpu.encode_image(images), cpu.encode_image(images), atol=1e-5)
    assert clip_export.verify(tiny_bundle, backend="onnxruntime", device="cuda:0", hostile=False).passed


def test_cuda_keeps_the_contract_in_half_precision(both: Bundle) -> None:
    found = clip_export.verify(both, backend="onnxruntime", device="cuda:0", precision="fp16", hostile=False)
    assert found.rows
    assert all(row.precision == "fp16" for row in found.rows)
    assert found.passed


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_binding_equals_a_plain_run(both: Bundle, tower: Tower, precision: str) -> None:
    engine, feeds = engine_of(both, tower, precision), golden_feeds(both, tower)
    plain = engine(feeds)["embedding"]
    left = engine.run_on_device(feeds, outputs=["embedding"])["embedding"]
    assert (left.shape, left.dtype) == (plain.shape, plain.dtype)
    # fp16 kernels may be chosen anew for each run: the last bits are not promised, the direction is.
    assert rows_cosine(left.numpy(), plain).min() > (0.9999 if precision == "fp16" else 0.999999)


@pytest.mark.parametrize("tower", TOWERS)
def test_results_cross_to_torch_without_a_copy(both: Bundle, tower: Tower) -> None:
    torch = pytest.importorskip("torch")
    engine, feeds = engine_of(both, tower, "fp32"), golden_feeds(both, tower)
    left = engine.run_on_device(feeds, outputs=["embedding"])["embedding"]
    tensor = torch.from_dlpack(left)
    assert tensor.device.type == "cuda"
    assert tensor.data_ptr() == left.pointer
    engine.close()
    del left
    np.testing.assert_allclose(tensor.cpu().numpy(), engine_of(both, tower, "fp32")(feeds)["embedding"], atol=1e-5)


@pytest.mark.parametrize("tower", TOWERS)
def test_inputs_come_from_torch_while_it_still_computes_them(both: Bundle, tower: Tower) -> None:
    torch = pytest.importorskip("torch")
    engine, feeds = engine_of(both, tower, "fp32"), golden_feeds(both, tower)
    plain = engine(feeds)["embedding"]
    matrix = torch.randn(4096, 4096, device="cuda") / 64
    busy = matrix
    for _ in range(20):  # work before them in the queue, so that nobody reads them in time by luck
        busy = busy @ matrix
    delayed = {name: torch.from_numpy(array).cuda() + (busy[0, 0] * 0).to(torch.uint8) for name, array in feeds.items()}
    given = {name: tensor.to(torch.from_numpy(feeds[name]).dtype) for name, tensor in delayed.items()}
    left = engine.run_on_device(cast(Any, given), outputs=["embedding"])["embedding"]
    np.testing.assert_allclose(left.numpy(), plain, atol=1e-5)
    np.testing.assert_allclose(engine(given)["embedding"], plain, atol=1e-5)


def test_tf32_changes_nothing_unless_it_is_asked_for(both: Bundle) -> None:
    feeds = golden_feeds(both, "image")
    exact, again = (engine_of(both, "image", "fp32")(feeds)["embedding"] for _ in range(2))
    np.testing.assert_allclose(again, exact, atol=1e-6)
    coarse = engine_of(both, "image", "fp32", tf32=True)(feeds)["embedding"]
    assert rows_cosine(coarse, exact).min() > 0.999


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_eight_threads_get_the_same_answers(both: Bundle, precision: str) -> None:
    images = [data.astronaut(), data.coffee()]
    wrong: list[float] = []
    with clip_export.load(both, backend="onnxruntime", device="cuda:0", precision=precision) as clip:
        texts, pictures = clip.encode_text(TEXTS), clip.encode_image(images)
        least = 0.9999 if precision == "fp16" else 0.99999

        def work() -> None:
            for _ in range(10):
                found = [rows_cosine(clip.encode_text(TEXTS), texts), rows_cosine(clip.encode_image(images), pictures)]
                wrong.extend(float(cosine) for cosine in np.concatenate(found) if not cosine >= least)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_a_batch_beyond_the_memory_runs_in_parts_or_says_so(tiny_bundle: Path) -> None:
    """Patches of half a million pictures need more than any GPU has at once."""
    bundle = Bundle.open(tiny_bundle)
    pixels = np.broadcast_to(golden_feeds(bundle, "image")["pixels"][:1], (2**19, 3, 32, 32))
    engine = engine_of(bundle, "image", "fp32")
    first = engine({"pixels": np.ascontiguousarray(pixels[:1])})["embedding"]
    try:
        with pytest.warns(UserWarning, match="runs in two halves"):
            found = engine({"pixels": np.ascontiguousarray(pixels)})["embedding"]
    except pytest.fail.Exception:
        pytest.skip("this GPU has the memory")
    np.testing.assert_allclose(found[-1:], first, atol=1e-5)
