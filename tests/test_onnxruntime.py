"""The ONNX Runtime backend as far as a machine without a GPU can prove it; the rest is in test_gpu.py."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from clip_export import backends
from clip_export.backends import _ort_binding, _ort_memory, _ort_session
from clip_export.errors import BackendError, DeviceError, MissingDependencyError


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """y = x W and s = softmax(y), for x float32 [batch, 4]; z = the number of rows."""
    weight = np.random.default_rng(0).standard_normal((4, 3), dtype=np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"]),
        helper.make_node("Softmax", ["y"], ["s"]),
        helper.make_node("Shape", ["x"], ["z"], end=1),
    ]
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "small",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
            [
                helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3]),
                helper.make_tensor_value_info("s", TensorProto.FLOAT, ["batch", 3]),
                helper.make_tensor_value_info("z", TensorProto.INT64, [1]),
            ],
            [onnx.numpy_helper.from_array(weight, "w")],
        ),
        opset_imports=[helper.make_opsetid("", 23)],
        ir_version=10,
    )
    path = tmp_path_factory.mktemp("graphs") / "small.onnx"
    onnx.save(model, path)
    return path


def feeds(batch: int = 5) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(batch).standard_normal((batch, 4), dtype=np.float32)}


def session_of(graph: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


def test_all_outputs_or_those_asked_for(graph: Path) -> None:
    every = backends.open_engine("onnxruntime", graph)
    assert every.outputs == ("y", "s", "z")
    one = backends.open_engine("onnxruntime", graph, outputs=["s"])
    assert one.outputs == ("s",)
    found = one(feeds())
    assert found.keys() == {"s"}
    np.testing.assert_array_equal(found["s"], every(feeds())["s"])


@pytest.mark.parametrize(("outputs", "found"), [(["s", "logits"], "logits"), ([], "none")])
def test_outputs_that_the_graph_lacks(graph: Path, outputs: list[str], found: str) -> None:
    with pytest.raises(BackendError, match=f"expected outputs among y, s, z, found {found}"):
        backends.open_engine("onnxruntime", graph, outputs=outputs)


def test_binding_gives_what_a_plain_run_gives(graph: Path) -> None:
    """The same code binds for a GPU, with `cuda` in the place of `cpu`."""
    session = session_of(graph)
    plain = session.run(["y", "s"], feeds())
    transposed = {"x": np.asfortranarray(feeds()["x"])}
    for given in (feeds(), transposed):
        bound = _ort_binding.run_bound(session, given, ["s", "y"], device="cpu", index=0)
        assert list(bound) == ["s", "y"]
        np.testing.assert_array_equal(bound["y"].numpy(), plain[0])
        np.testing.assert_array_equal(bound["s"].numpy(), plain[1])
        assert _ort_binding.dtype_of(bound["s"]) == np.float32


def test_binding_in_threads(graph: Path) -> None:
    session = session_of(graph)
    failures: list[object] = []

    def work(batch: int) -> None:
        expected = session.run(["s"], feeds(batch))[0]
        for _ in range(20):
            found = _ort_binding.run_bound(session, feeds(batch), ["s"], device="cpu", index=0)["s"].numpy()
            if not np.array_equal(found, expected):
                failures.append(batch)

    threads = [threading.Thread(target=work, args=(batch,)) for batch in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_what_is_no_array(graph: Path) -> None:
    session = session_of(graph)
    for value in (torch.zeros(5, 4), [[0.0] * 4]):
        with pytest.raises(BackendError, match=r"x: expected a numpy array or an array on a GPU, found (Tensor|list)"):
            _ort_binding.run_bound(session, {"x": value}, ["s"], device="cpu", index=0)


class Described:
    """The description of an array on a GPU, and no memory behind it: what is refused is refused before it is read."""

    dtype = np.dtype(np.float32)

    def __init__(self, shape: tuple[int, ...], strides: tuple[int, ...] | None) -> None:
        self.shape = shape
        self.__cuda_array_interface__ = {"shape": shape, "strides": strides, "typestr": "<f4", "data": (16, False)}


def test_an_array_with_gaps_is_refused(graph: Path) -> None:
    session = session_of(graph)
    with pytest.raises(BackendError, match=r"x: expected an array without gaps, found strides \(32, 4\)") as caught:
        _ort_binding.run_bound(session, {"x": Described((5, 4), (32, 4))}, ["s"], device="cpu", index=0)
    assert ".contiguous()" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("shape", "strides", "contiguous"),
    [
        ((5, 4), (16, 4), True),
        ((1, 4), (996, 4), True),  # the stride of an axis of one is never taken
        ((5, 4), (4, 20), False),
        ((5, 4), (32, 4), False),
        ((5,), (8,), False),
    ],
)
def test_strides_of_an_array_without_gaps(shape: tuple[int, ...], strides: tuple[int, ...], contiguous: bool) -> None:
    assert _ort_binding._contiguous(Described(shape, strides).__cuda_array_interface__) is contiguous


def test_device_output_needs_a_gpu(graph: Path) -> None:
    engine: Any = backends.open_engine("onnxruntime", graph)
    with pytest.raises(BackendError, match="the results of device cpu are on the CPU") as caught:
        engine.run_on_device(feeds(), outputs=["s"])
    assert "cuda:0" in str(caught.value.hint)


def test_assignment_names_every_operator(graph: Path) -> None:
    cpu = "CPUExecutionProvider"
    assert sorted(_ort_session.assignment(session_of(graph))) == [(cpu, "MatMul"), (cpu, "Shape"), (cpu, "Softmax")]


def test_nodes_that_would_run_on_the_cpu_are_named() -> None:
    cpu, cuda = _ort_session.CPU, _ort_session.CUDA
    nodes = [(cuda, "MatMul"), (cpu, "Shape"), (cpu, "Gather"), *[(cpu, "Attention")] * 12, (cpu, "LayerNormalization")]
    with pytest.raises(BackendError) as caught:
        _ort_session.check_placement(nodes, "text.onnx", version="1.24.4")
    assert caught.value.message == (
        "ONNX Runtime 1.24.4 has no CUDA kernel for 12 Attention, 1 LayerNormalization of text.onnx, "
        "and would run them on the CPU"
    )
    assert caught.value.hint == "pip install --upgrade 'onnxruntime-gpu>=1.25', or use device cpu"


def test_arithmetic_on_shapes_may_run_on_the_cpu() -> None:
    cpu, cuda = _ort_session.CPU, _ort_session.CUDA
    _ort_session.check_placement([(cuda, "MatMul"), (cpu, "Shape"), (cpu, "Concat")], "text.onnx", version="1.31.0")


def test_a_session_without_any_cuda_node_is_refused() -> None:
    for nodes in ([], [(_ort_session.CPU, "Shape")]):
        with pytest.raises(BackendError, match=r"no CUDA kernel for all nodes of text\.onnx"):
            _ort_session.check_placement(nodes, "text.onnx", version="1.31.0")


def test_a_real_cpu_session_does_not_pass_for_a_gpu_one(graph: Path) -> None:
    with pytest.raises(BackendError, match=r"no CUDA kernel for 1 MatMul, 1 Softmax of small\.onnx"):
        _ort_session.check_placement(_ort_session.assignment(session_of(graph)), graph.name, version="1")


def test_a_version_that_cannot_say_where_nodes_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("onnxruntime.capi.onnxruntime_inference_collection.Session.get_provider_graph_assignment_info")
    with pytest.raises(BackendError, match=rf"ONNX Runtime {onnxruntime.__version__} cannot say which nodes") as caught:
        _ort_session._require_placement(onnxruntime)
    assert "onnxruntime-gpu>=1.25" in str(caught.value.hint)


def test_tf32_is_off_unless_asked_for() -> None:
    assert _ort_session.provider_for("cpu") == ("CPUExecutionProvider", {})
    for tf32 in (False, True):
        provider, options = _ort_session.provider_for("cuda:1", tf32=tf32)
        assert provider == "CUDAExecutionProvider"
        assert (options["device_id"], options["use_tf32"]) == (1, int(tf32))


def test_options(graph: Path) -> None:
    assert _ort_session.tf32_option(None) is False
    assert _ort_session.tf32_option({"tf32": True}) is True
    backends.open_engine("onnxruntime", graph, options={"tf32": False})
    with pytest.raises(BackendError, match="tf32 is a mode of NVIDIA GPUs, found device cpu"):
        backends.open_engine("onnxruntime", graph, options={"tf32": True})
    with pytest.raises(BackendError, match="ONNX Runtime has no option cuda_graphs") as caught:
        backends.open_engine("onnxruntime", graph, options={"tf32": True, "cuda_graphs": True})
    assert "tf32" in str(caught.value.hint)
    with pytest.raises(BackendError, match="expected tf32 True or False, found 'yes'"):
        backends.open_engine("onnxruntime", graph, options={"tf32": "yes"})
    with pytest.raises(BackendError, match="expected options of ONNX Runtime as a dict, found list"):
        backends.open_engine("onnxruntime", graph, options=["tf32"])


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cuda:", "cuda:-1", "CPU", "", None, 0])
def test_devices_that_cannot_be(device: Any) -> None:
    with pytest.raises(BackendError, match="expected device cpu or cuda:N, found"):
        _ort_session.device_index(device)


def test_devices() -> None:
    assert [_ort_session.device_index(device) for device in ("cpu", "cuda", "cuda:0", "cuda:3")] == [None, 0, 0, 3]


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this one has CUDA")
def test_a_runtime_without_cuda(graph: Path) -> None:
    with pytest.raises(BackendError, match="cuda:0 needs ONNX Runtime's CUDAExecutionProvider; the one") as caught:
        backends.open_engine("onnxruntime", graph, device="cuda:0")
    assert "clip-export[cuda]" in str(caught.value.hint)


def test_a_provider_whose_library_cannot_be_loaded(tmp_path: Path) -> None:
    """The loader is the real one; what it says is passed on."""
    library = tmp_path / "capi" / "libonnxruntime_providers_cuda.so"
    library.parent.mkdir()
    library.write_bytes(b"no library")

    class Installed:
        __file__ = str(tmp_path / "__init__.py")
        __version__ = "1.31.0"

    error = _ort_session._no_cuda(Installed)
    assert isinstance(error, DeviceError)
    assert error.message.startswith("ONNX Runtime cannot load its CUDA provider: ")
    assert "libonnxruntime_providers_cuda.so" in error.message
    assert "onnxruntime-gpu[cuda,cudnn]==1.31.0" in str(error.hint)
    library.unlink()
    error = _ort_session._no_cuda(Installed)
    assert "there is no GPU, no driver" in error.message
    assert error.hint == "check nvidia-smi, or use device cpu"


def test_without_onnxruntime(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match="ONNX Runtime is not installed") as caught:
        backends.open_engine("onnxruntime", graph)
    assert "clip-export[cpu]" in str(caught.value.hint)


def test_wrong_feeds_and_a_closed_engine(graph: Path) -> None:
    engine = backends.open_engine("onnxruntime", graph)
    with pytest.raises(BackendError, match=r"ONNX Runtime failed on x float64 \[5, 4\]"):
        engine({"x": feeds()["x"].astype(np.float64)})
    engine.close()
    with pytest.raises(BackendError, match="this engine is closed"):
        engine(feeds())


# What ONNX Runtime, CUDA, cuBLAS and cuDNN say, shortened.
@pytest.mark.parametrize(
    "said",
    [
        "BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer of size 939524096",
        "CUDA failure 2: out of memory ; GPU=0 ; expr=cudaMalloc((void**)&p, size);",
        "CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0",
        "CUDNN failure 2: CUDNN_STATUS_ALLOC_FAILED ; GPU=0",
    ],
)
def test_out_of_memory_is_told_apart(said: str) -> None:
    assert _ort_memory.says_out_of_memory(RuntimeError(said))
    assert not _ort_memory.says_out_of_memory(RuntimeError("Unexpected input data type"))
    error = _ort_memory.out_of_memory({"pixels": np.zeros((256, 3, 4, 4), np.uint8)}, "cuda:0", RuntimeError(said))
    assert error.message == f"not enough memory on cuda:0 for pixels uint8 [256, 3, 4, 4]: {said}"
    assert error.hint is not None
    assert error.hint.startswith("use a smaller batch_size, at most 128; or free memory that others hold: nvidia-smi")


def limited(room: int, batches: list[int]) -> Any:
    """A run that has room for a batch of `room`, and notes those that went through."""

    def run(given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if len(given["x"]) > room:
            raise DeviceError("not enough memory")
        batches.append(len(given["x"]))
        return {"y": given["x"] * 2, "z": given["x"][:, 0]}

    return run


def test_a_batch_that_does_not_fit_runs_in_halves() -> None:
    batches: list[int] = []
    given = {"x": feeds(11)["x"], "eot_index": np.arange(11)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = _ort_memory.run_in_halves(limited(3, batches), given)
    np.testing.assert_array_equal(found["y"], given["x"] * 2)
    np.testing.assert_array_equal(found["z"], given["x"][:, 0])
    assert batches == [2, 3, 3, 3]
    said = str(caught[0].message)
    assert said == "a batch of 11 runs in two halves: not enough memory; a batch_size of 5 avoids trying in vain"


def test_a_batch_of_one_that_does_not_fit_raises() -> None:
    with pytest.warns(UserWarning, match="a batch of 2 runs in two halves"), pytest.raises(DeviceError):
        _ort_memory.run_in_halves(limited(0, []), feeds(2))
    with pytest.raises(DeviceError, match="not enough memory"):
        _ort_memory.run_in_halves(limited(0, []), feeds(1))


def test_a_batch_that_fits_is_run_once() -> None:
    batches: list[int] = []
    _ort_memory.run_in_halves(limited(8, batches), feeds(8))
    assert batches == [8]
