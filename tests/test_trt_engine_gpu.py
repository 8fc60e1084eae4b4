"""Running plans on a GPU, with TensorRT or TensorRT-RTX, whichever works there; compared with numpy.

The graph is small and of fp32, so that what is compared are the copies, the profiles and the threads, not the rounding.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from clip_export import backends
from clip_export.backends import _cuda, _cuda_memory
from clip_export.backends._trt_engine import TensorRtEngine
from clip_export.backends.building import BuildRequest, EngineOptions, Profile, ShapeRange
from clip_export.backends.device_array import DeviceArray
from clip_export.errors import BackendError, DeviceError, InputError

pytestmark = pytest.mark.gpu

PIXELS, WIDTH = 48, 20  # 80 bytes a row: no row but the first begins at a multiple of 256
MATRIX = np.random.default_rng(3).normal(0, 0.1, (PIXELS, WIDTH)).astype(np.float32)
BATCHES = (1, 2, 8, 9, 64, 65, 130, 300, 3)


def batches(*ranges: tuple[int, int]) -> tuple[Profile, ...]:
    def span(low: int, high: int, *rest: int) -> ShapeRange:
        return ShapeRange(min=(low, *rest), opt=(high, *rest), max=(high, *rest))

    return tuple({"pixels": span(low, high, PIXELS), "offset": span(low, high)} for low, high in ranges)


def save_graph(path: Path) -> Path:
    """pixels uint8 [n, 48] and offset int32 [n] -> embedding = relu(pixels) @ matrix + offset, and its negative."""
    nodes = [
        helper.make_node("Cast", ["pixels"], ["values"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["values", "matrix"], ["product"]),
        helper.make_node("Cast", ["offset"], ["offsets"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["offsets", "axis"], ["column"]),
        helper.make_node("Add", ["product", "column"], ["embedding"]),
        helper.make_node("Neg", ["embedding"], ["negative"]),
    ]
    inputs = [
        helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["n", PIXELS]),
        helper.make_tensor_value_info("offset", TensorProto.INT32, ["n"]),
    ]
    names = ("embedding", "negative")
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", WIDTH]) for name in names]
    weights = [numpy_helper.from_array(MATRIX, "matrix"), numpy_helper.from_array(np.array([1]), "axis")]
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def feeds_of(rows: int) -> dict[str, Any]:
    random = np.random.default_rng(rows)
    pixels = random.integers(0, 256, (rows, PIXELS), dtype=np.uint8)
    return {"pixels": pixels, "offset": random.integers(-50, 50, rows, dtype=np.int32)}


def expected_of(feeds: dict[str, Any]) -> np.ndarray:
    product = feeds["pixels"].astype(np.float64) @ MATRIX.astype(np.float64)
    return cast(np.ndarray, (product + feeds["offset"][:, None]).astype(np.float32))


def check(found: np.ndarray, feeds: dict[str, Any]) -> None:
    np.testing.assert_allclose(found, expected_of(feeds), rtol=1e-4, atol=1e-3)


@pytest.fixture(scope="module")
def backend() -> str:
    works = [name for name in backends.COMPILERS if backends.status(name).works]
    if not works:
        pytest.skip("; ".join(backends.status(name).reason for name in backends.COMPILERS))
    return works[0]


Build = Callable[..., Path]


@pytest.fixture(scope="module")
def build(backend: str, tmp_path_factory: pytest.TempPathFactory) -> Build:
    made: dict[Any, Path] = {}
    graph = save_graph(tmp_path_factory.mktemp("graph") / "small.onnx")

    def build(*ranges: tuple[int, int], **options: Any) -> Path:
        key = (ranges, tuple(options.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("plan") / "small.plan"
            request = BuildRequest(graph=graph, plan=made[key], profiles=batches(*ranges), **options)
            backends.compiler(backend).build_plan(request, progress=lambda *_: None)
        return made[key]

    return build


Open = Callable[..., TensorRtEngine]


@pytest.fixture
def open_plan(backend: str) -> Iterator[Open]:
    opened: list[TensorRtEngine] = []

    def open_plan(path: Path, outputs: list[str] | None = None, **options: Any) -> TensorRtEngine:
        given = EngineOptions(**options)
        engine = backends.open_engine(backend, path, device="cuda:0", outputs=outputs, options=given)
        opened.append(cast(TensorRtEngine, engine))
        return opened[-1]

    yield open_plan
    for engine in opened:
        engine.close()


@pytest.fixture
def engine(build: Build, open_plan: Open) -> TensorRtEngine:
    return open_plan(build((1, 1), (2, 8), (9, 64)))


@pytest.mark.parametrize("rows", BATCHES)
def test_gives_what_numpy_gives(engine: TensorRtEngine, rows: int) -> None:
    feeds = feeds_of(rows)
    assert engine.outputs == ("embedding", "negative")
    for _ in range(4):  # plain, captured and replayed
        found = engine(feeds)
        assert list(found) == ["embedding", "negative"]
        check(found["embedding"], feeds)
        np.testing.assert_array_equal(found["negative"], -found["embedding"])


def test_fixed_profiles_are_padded(build: Build, open_plan: Open) -> None:
    engine = open_plan(build((4, 4), (16, 16)))
    for rows in (1, 3, 4, 5, 16, 21, 40):
        feeds = feeds_of(rows)
        check(engine(feeds)["embedding"], feeds)
        check(engine.run_on_device(feeds, outputs=["embedding"])["embedding"].numpy(), feeds)


def test_only_the_outputs_that_are_asked_for(build: Build, open_plan: Open) -> None:
    engine = open_plan(build((1, 8)), ["negative"])
    feeds = feeds_of(3)
    assert engine.outputs == ("negative",)
    assert list(engine(feeds)) == ["negative"]
    assert list(engine.run_on_device(feeds, outputs=["embedding"])) == ["embedding"]
    with pytest.raises(BackendError, match="expected outputs among embedding, negative, found pooled"):
        engine.run_on_device(feeds, outputs=["pooled"])


def test_eight_threads_get_the_same_answers(engine: TensorRtEngine) -> None:
    failures: list[BaseException] = []

    def run(seed: int) -> None:
        random = np.random.default_rng(seed)
        try:
            for _ in range(25):
                feeds = feeds_of(int(random.integers(1, 150)))
                check(engine(feeds)["embedding"], feeds)
        except BaseException as error:  # noqa: BLE001  what a thread raises is lost otherwise
            failures.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_graphs_change_no_bit(build: Build, open_plan: Open) -> None:
    path = build((1, 64))
    with_graphs, without = open_plan(path), open_plan(path, cuda_graphs=False)
    for rows in (5, 64, 130):
        for _ in range(4):
            feeds = feeds_of(rows)
            np.testing.assert_array_equal(with_graphs(feeds)["embedding"], without(feeds)["embedding"])
            check(without(feeds)["embedding"], feeds)


def test_results_stay_on_the_device_and_outlive_the_engine(build: Build, open_plan: Open) -> None:
    engine = open_plan(build((1, 1), (2, 8)))
    feeds = feeds_of(19)
    found = engine.run_on_device(feeds, outputs=["negative", "embedding"])
    assert list(found) == ["negative", "embedding"]
    engine(feeds_of(8))  # the engine's own buffers are used again
    engine.close()
    gc.collect()
    check(found["embedding"].numpy(), feeds)
    check(-found["negative"].numpy(), feeds)
    assert found["embedding"].__cuda_array_interface__["stream"] > 2


def test_device_arrays_go_in(engine: TensorRtEngine) -> None:
    feeds = feeds_of(70)
    device = _cuda.open_device(0)
    memory = _cuda_memory.DeviceMemory(device, feeds["pixels"].nbytes)
    pinned = _cuda_memory.PinnedMemory(device, feeds["pixels"].nbytes)
    pinned.view(feeds["pixels"].shape, feeds["pixels"].dtype)[:] = feeds["pixels"]
    stream, ready = _cuda_memory.Stream(device), _cuda_memory.Event(device)
    with device.current():
        stream.to_device(memory.pointer, pinned.pointer, pinned.nbytes)
        ready.record(stream)
    pixels = DeviceArray(
        memory.pointer, feeds["pixels"].shape, feeds["pixels"].dtype, owner=memory, ready=ready, stream=stream
    )
    check(engine({**feeds, "pixels": pixels})["embedding"], feeds)
    again = engine.run_on_device({**feeds, "pixels": pixels}, outputs=["embedding"])
    check(again["embedding"].numpy(), feeds)


def test_torch_tensors_go_in_and_out_without_a_copy(engine: TensorRtEngine) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    feeds = feeds_of(70)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # what is computed on any stream is waited for
        busy = torch.ones(4096, 4096, device="cuda")
        for _ in range(20):
            busy = busy @ busy * 0
        pixels = torch.from_numpy(feeds["pixels"]).cuda(non_blocking=True) + busy[0, 0].to(torch.uint8)
        found = engine.run_on_device({**feeds, "pixels": pixels}, outputs=["embedding"])["embedding"]
        tensor = torch.from_dlpack(found)
        doubled = tensor * 2
    pointer = found.pointer
    found.close()
    del found, pixels
    gc.collect()
    assert tensor.data_ptr() == pointer
    side.synchronize()
    check(tensor.cpu().numpy(), feeds)
    np.testing.assert_array_equal(doubled.cpu().numpy(), tensor.cpu().numpy() * 2)
    with pytest.raises(InputError, match="pixels: expected an array without gaps"):
        engine({**feeds, "pixels": torch.zeros(PIXELS, 70, dtype=torch.uint8, device="cuda").T})


def test_inputs_that_the_plan_does_not_take(engine: TensorRtEngine) -> None:
    feeds = feeds_of(3)
    with pytest.raises(InputError, match="expected inputs pixels, offset, found pixels"):
        engine({"pixels": feeds["pixels"]})
    with pytest.raises(InputError, match="offset: expected int32, found int64"):
        engine({**feeds, "offset": feeds["offset"].astype(np.int64)})
    with pytest.raises(InputError, match="pixels: expected 48 on axis 1, found 47"):
        engine({**feeds, "pixels": feeds["pixels"][:, 1:]})
    with pytest.raises(InputError, match="the same number of rows"):
        engine({**feeds, "offset": feeds["offset"][:2]})
    check(engine(feeds)["embedding"], feeds)


def test_what_it_takes_is_told_and_given_back(build: Build, open_plan: Open) -> None:
    device = _cuda.open_device(0)
    path = build((1, 1), (2, 8), (9, 64))
    open_plan(path).close()  # what the libraries load once stays
    before = device.free_bytes()
    with open_plan(path) as engine:
        for rows in BATCHES:
            engine(feeds_of(rows))
        memory = engine.memory_bytes
        assert memory.weights > 0
        assert memory.buffers == 2 * 64 * (PIXELS + 4)
    engine.close()
    gc.collect()
    assert before - device.free_bytes() < 64 << 20
    with pytest.raises(BackendError, match="this engine is closed"):
        engine(feeds_of(1))
    with pytest.raises(BackendError, match="this engine is closed"):
        _ = engine.memory_bytes


@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.99])
def test_a_truncated_plan(build: Build, open_plan: Open, tmp_path: Path, kept: float) -> None:
    whole = build((1, 8)).read_bytes()
    path = tmp_path / "cut.plan"
    path.write_bytes(whole[: int(kept if kept > 1 else len(whole) * kept)])
    with pytest.raises(BackendError, match=r"cut\.plan") as caught:
        open_plan(path)
    assert "Error Code" not in str(caught.value)
    assert "build the plan again" in str(caught.value.hint)


def test_no_plan_and_no_such_gpu(backend: str, build: Build, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"absent\.plan cannot be read"):
        backends.open_engine(backend, tmp_path / "absent.plan", device="cuda:0")
    with pytest.raises(DeviceError, match="there is no GPU number 99"):
        backends.open_engine(backend, build((1, 8)), device="cuda:99")


def test_the_kernels_of_this_gpu_are_kept(backend: str, build: Build, open_plan: Open, tmp_path: Path) -> None:
    if backend != "tensorrt-rtx":
        pytest.skip("only TensorRT-RTX compiles kernels when a plan is run")
    cache = tmp_path / "runtime.cache"
    feeds = feeds_of(5)
    for _ in range(2):
        engine = open_plan(build((1, 8)), runtime_cache=cache, specialization="eager")
        check(engine(feeds)["embedding"], feeds)
        engine.close()
        assert cache.stat().st_size > 0
    assert [file.name for file in tmp_path.iterdir()] == ["runtime.cache"]


def test_out_of_memory_runs_in_smaller_parts(backend: str, open_plan: Open, tmp_path: Path) -> None:
    """A graph with rows of a mebibyte, on a GPU of which little is left."""
    row, most = 1 << 18, 1024
    nodes = [helper.make_node("ReduceMax", ["x", "axis"], ["y"], keepdims=1)]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", row])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 1])],
        [numpy_helper.from_array(np.array([1]), "axis")],
    )
    path = tmp_path / "wide.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    span = ShapeRange(min=(1, row), opt=(64, row), max=(most, row))
    request = BuildRequest(graph=path, plan=tmp_path / "wide.plan", profiles=({"x": span},))
    backends.compiler(backend).build_plan(request, progress=lambda *_: None)
    engine = open_plan(request.plan)
    x = np.zeros((most, row), np.float32)
    x[:, 7] = np.arange(1, most + 1)

    device, hog = _cuda.open_device(0), []
    while device.free_bytes() > 900 << 20:
        hog.append(_cuda_memory.DeviceMemory(device, min(device.free_bytes() - (800 << 20), 4 << 30)))
    with pytest.warns(RuntimeWarning, match=r"wide\.plan ran in batches of \d+: not enough GPU memory for 1024"):
        found = engine({"x": x})["y"]
    np.testing.assert_array_equal(found[:, 0], x[:, 7])
    np.testing.assert_array_equal(engine({"x": x})["y"], found)  # said once
    engine.close()

    engine = open_plan(request.plan)
    filling = 64 << 20
    while filling > 1 << 10:
        try:
            hog.append(_cuda_memory.DeviceMemory(device, filling))
        except _cuda.GpuMemoryError:
            filling //= 2
    with pytest.raises(
        DeviceError, match=r"not enough GPU memory for a batch of \d+ with wide\.plan: \d+ MiB are free"
    ):
        engine({"x": x})
    for memory in hog:
        memory.close()
