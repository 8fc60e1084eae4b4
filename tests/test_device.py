"""What stands between an engine and the GPU, as far as it can be tested without one."""

from __future__ import annotations

import ctypes.util
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_export.backends import _cuda, _trt_plan, _trt_pool
from clip_export.backends._cuda import GpuMemoryError, device_index, device_status
from clip_export.backends._trt_cache import RuntimeCache
from clip_export.backends.building import EngineOptions
from clip_export.backends.device_array import DeviceArray, contiguous, is_device_array, read
from clip_export.errors import BackendError, DeviceError, InputError

has_driver = ctypes.util.find_library("cuda") is not None


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    return found.stdout


class Answers:
    """In place of the driver: what its functions return."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **values: Any) -> None:
        pytest.importorskip("cuda.bindings", reason="cuda-python is not installed")
        _cuda._start_driver.cache_clear()
        monkeypatch.setattr(_cuda, "call", lambda name, *_: values.get(name))


@pytest.fixture(autouse=True)
def forget_the_driver() -> Iterator[None]:
    yield
    _cuda._start_driver.cache_clear()


@pytest.mark.parametrize(("device", "index"), [("cuda", 0), ("cuda:0", 0), ("cuda:11", 11)])
def test_device_strings(device: str, index: int) -> None:
    assert device_index(device) == index


@pytest.mark.parametrize("device", ["cpu", "cuda:", "cuda:-1", "cuda:x", "gpu:0", "", "cuda:²", None, 0])
def test_other_device_strings_are_refused(device: Any) -> None:
    with pytest.raises(BackendError, match="expected device cuda:N, found") as caught:
        device_index(device)
    assert "cuda:0" in str(caught.value.hint)


@pytest.mark.skipif(has_driver, reason="there is an NVIDIA driver here")
def test_no_driver() -> None:
    pytest.importorskip("cuda.bindings", reason="cuda-python is not installed")
    with pytest.raises(DeviceError, match="there is no NVIDIA driver on this machine: libcuda was not found") as caught:
        device_status()
    assert "--gpus all" in str(caught.value.hint)


def test_no_cuda_python() -> None:
    code = (
        "import sys; sys.modules['cuda'] = None\n"
        "from clip_export.backends._cuda import device_status\n"
        "from clip_export.errors import MissingDependencyError\n"
        "try: device_status()\n"
        "except MissingDependencyError as error: print(error)"
    )
    found = python(code)
    assert "cuda-python cannot be imported" in found
    assert "pip install 'clip-export[tensorrt-rtx]'" in found


def test_importing_the_engine_loads_no_heavy_library() -> None:
    code = (
        "import sys\n"
        "from clip_export.backends import _trt_engine, device_array, profiles\n"
        "heavy = ('cuda', 'tensorrt', 'tensorrt_rtx', 'torch', 'onnx')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    assert python(code).strip() == "[]"


def test_a_driver_older_than_the_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    Answers(monkeypatch, cuDriverGetVersion=11040)
    with pytest.raises(DeviceError, match=r"the NVIDIA driver is too old: it runs CUDA 11\.4, cuda-python") as caught:
        device_status()
    assert "update the driver" in str(caught.value.hint)


@pytest.mark.parametrize(("count", "has"), [(1, "one GPU, number 0"), (3, "3 GPUs, numbers 0 to 2")])
def test_a_number_beyond_the_gpus(monkeypatch: pytest.MonkeyPatch, count: int, has: str) -> None:
    Answers(monkeypatch, cuDriverGetVersion=99000, cuDeviceGetCount=count)
    with pytest.raises(DeviceError, match=f"there is no GPU number 7: this machine has {has}"):
        device_status(7)


def test_no_gpu_behind_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    Answers(monkeypatch, cuDriverGetVersion=99000, cuDeviceGetCount=0)
    with pytest.raises(DeviceError, match="the NVIDIA driver finds no GPU") as caught:
        device_status()
    assert "CUDA_VISIBLE_DEVICES" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ("CUDA_ERROR_NO_DEVICE", "finds no GPU"),
        ("CUDA_ERROR_STUB_LIBRARY", "there is no NVIDIA driver"),
        ("CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "different versions"),
        ("CUDA_ERROR_OUT_OF_MEMORY", r"the GPU is out of memory \(cuMemAlloc\)"),
    ],
)
def test_what_the_driver_returns_becomes_a_sentence(status: str, words: str) -> None:
    driver = pytest.importorskip("cuda.bindings.driver", reason="cuda-python is not installed")
    error = _cuda._failure("cuMemAlloc", getattr(driver.CUresult, status))
    with pytest.raises(DeviceError, match=words):
        raise error
    assert isinstance(error, GpuMemoryError) == (status == "CUDA_ERROR_OUT_OF_MEMORY")


def an_array(shape: tuple[int, ...] = (2, 3), device: int = 0) -> DeviceArray:
    return DeviceArray(0x1000, shape, np.float32, owner=object(), device=device)


def test_a_device_array_describes_itself() -> None:
    array = an_array()
    assert (array.shape, array.ndim, array.size, array.nbytes, array.dtype) == ((2, 3), 2, 6, 24, np.dtype("float32"))
    assert repr(array) == "DeviceArray(shape=[2, 3], dtype=float32, device=cuda:0)"
    assert array.__dlpack_device__() == (2, 0)
    assert array.__cuda_array_interface__ == {
        "shape": (2, 3),
        "typestr": "<f4",
        "data": (0x1000, False),
        "strides": None,
        "version": 3,
        "stream": None,
    }


def test_a_closed_device_array_gives_nothing() -> None:
    with an_array() as array:
        pass
    array.close()
    for use in (array.numpy, array.__dlpack__, lambda: array.__cuda_array_interface__):
        with pytest.raises(BackendError, match="this device array is closed"):
            use()
    assert "closed" in repr(array)


def test_dlpack_refuses_what_would_be_a_copy() -> None:
    with pytest.raises(BufferError, match=r"this array is on cuda:0; numpy\(\) copies it"):
        an_array().__dlpack__(dl_device=(1, 0))
    with pytest.raises(BufferError, match="views, not copies"):
        an_array().__dlpack__(copy=True)


def test_an_empty_device_array_needs_no_gpu() -> None:
    array = an_array((0, 3))
    assert array.numpy().shape == (0, 3)
    assert array.__cuda_array_interface__["data"] == (0, False)


def test_which_values_are_on_a_device() -> None:
    torch = pytest.importorskip("torch")
    cai = SimpleNamespace(__cuda_array_interface__={})
    assert is_device_array(an_array())
    assert is_device_array(cai)
    assert not any(is_device_array(value) for value in (np.zeros(2), torch.zeros(2), [1.0], None))


def test_reading_an_array_of_another_gpu() -> None:
    here = cast(Any, SimpleNamespace(index=0))
    elsewhere = SimpleNamespace(__dlpack_device__=lambda: (2, 1))
    for value in (an_array(device=1), elsewhere):
        with pytest.raises(InputError, match="pixels: expected an array on cuda:0, found one on cuda:1") as caught:
            read(value, "pixels", device=here, stream=cast(Any, None))
        assert "move it to cuda:0" in str(caught.value.hint)


@given(shape=st.lists(st.integers(0, 3), min_size=1, max_size=4), data=st.data())
def test_contiguous_agrees_with_numpy(shape: list[int], data: st.DataObject) -> None:
    array = np.zeros([size + 1 for size in shape], np.float32)
    cut = array[tuple(slice(0, data.draw(st.integers(1, size))) for size in array.shape)]
    turned = cut.transpose(data.draw(st.permutations(range(cut.ndim))))
    strides = [stride // turned.itemsize for stride in turned.strides]
    assert contiguous(turned.shape, strides) == turned.flags.c_contiguous
    assert contiguous(turned.shape, None)


def test_engine_options_are_checked() -> None:
    with pytest.raises(InputError, match="expected max_contexts of at least 1, found 0"):
        EngineOptions(max_contexts=0)
    with pytest.raises(InputError, match="expected specialization lazy, eager or none, found 'never'"):
        EngineOptions(specialization=cast(Any, "never"))


def test_a_file_that_is_no_plan(tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    from clip_export.backends import _trt_library

    library = _trt_library.load(_trt_library.TENSORRT_RTX)
    runtime = trt.Runtime(_trt_plan._logger(library))
    with pytest.raises(BackendError, match=r"cannot run x\.plan here: the file is damaged or no plan") as caught:
        _trt_plan.check_validity(trt, runtime, bytes(1000), "x.plan", library.title)
    assert "clip-export build BUNDLE --engine tensorrt-rtx" in str(caught.value.hint)


def test_every_diagnostic_of_rtx_has_a_sentence() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    assert set(_trt_plan._CAUSES) == set(trt.EngineInvalidityDiagnostics.__members__)
    for name, bit in trt.EngineInvalidityDiagnostics.__members__.items():
        judged = trt.EngineValidity.INVALID, int(bit)
        runtime = SimpleNamespace(get_engine_validity=lambda _, judged=judged: judged)
        with pytest.raises(BackendError, match=f"cannot run x.plan here: {_trt_plan._CAUSES[name]}\n"):
            _trt_plan.check_validity(trt, runtime, b"", "x.plan", "TensorRT-RTX")


class Kernels:
    """In place of IRuntimeCache: some bytes, of which those of this GPU start with `mine`."""

    def __init__(self, blob: bytes = b"") -> None:
        self.blob = blob

    def create_runtime_cache(self) -> Kernels:
        return self

    def deserialize(self, blob: bytes) -> bool:
        fits = blob.startswith(b"mine")
        self.blob = blob if fits else self.blob
        return fits

    def serialize(self) -> bytes:
        return self.blob


def test_a_runtime_cache_is_kept_and_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "runtime.cache"
    cache = RuntimeCache(Kernels(b"mine 1"), path)
    cache.save()
    assert path.read_bytes() == b"mine 1"
    kernels = Kernels()
    again = RuntimeCache(kernels, path)
    assert kernels.blob == b"mine 1"
    path.unlink()
    again.save()
    assert not path.exists(), "what has not grown is not written again"
    path.write_bytes(b"of another GPU")
    RuntimeCache(Kernels(b"mine 2"), path).save()
    assert path.read_bytes() == b"mine 2"
    assert [file.name for file in tmp_path.iterdir()] == ["runtime.cache"]


def test_a_runtime_cache_that_cannot_be_kept_is_one_warning(tmp_path: Path) -> None:
    cache = RuntimeCache(Kernels(b"mine"), tmp_path / "absent" / "runtime.cache")
    with pytest.warns(RuntimeWarning, match=r"could not be kept in .*runtime\.cache: No such file or directory"):
        cache.save()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.save()


class MadeSlot:
    """In place of a slot: counts itself."""

    alive: list[MadeSlot]

    def __init__(self, plan: object, profile: int, rows: int) -> None:
        if rows > 1000:
            raise GpuMemoryError("the GPU is out of memory")
        self.profile, self.rows = profile, rows
        MadeSlot.alive.append(self)

    def close(self, error: BaseException | None = None) -> None:
        if self in MadeSlot.alive:
            MadeSlot.alive.remove(self)


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> _trt_pool.SlotPool:
    monkeypatch.setattr(_trt_pool, "Slot", MadeSlot)
    MadeSlot.alive = []
    return _trt_pool.SlotPool(cast(Any, None), 2)


def test_a_slot_is_lent_again(pool: _trt_pool.SlotPool) -> None:
    with pool.lend(0, 8) as first:
        pass
    with pool.lend(0, 4) as second:
        assert second is first
    with pool.lend(0, 16) as third:
        assert third is not first


def test_an_idle_slot_of_another_profile_makes_room(pool: _trt_pool.SlotPool) -> None:
    for profile in (0, 1, 2):
        with pool.lend(profile, 1):
            assert len(MadeSlot.alive) <= 2
    assert [slot.profile for slot in MadeSlot.alive] == [1, 2]


def test_no_more_slots_than_allowed_are_lent_at_once(pool: _trt_pool.SlotPool) -> None:
    most, now, lock = 0, 0, threading.Lock()

    def use(profile: int) -> None:
        nonlocal most, now
        for _ in range(20):
            with pool.lend(profile, 1):
                with lock:
                    now += 1
                    most = max(most, now)
                time.sleep(0.0001)
                with lock:
                    now -= 1

    threads = [threading.Thread(target=use, args=(number % 3,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert most == 2
    assert len(MadeSlot.alive) <= 2


def test_a_slot_that_failed_is_closed_and_its_place_is_free(pool: _trt_pool.SlotPool) -> None:
    for _ in range(5):
        with pytest.raises(ZeroDivisionError), pool.lend(0, 1):
            raise ZeroDivisionError
        with pytest.raises(GpuMemoryError), pool.lend(0, 1001):
            pass
    assert MadeSlot.alive == []
    with pool.lend(0, 1), pool.lend(0, 1):
        assert len(MadeSlot.alive) == 2


def test_closing_waits_for_what_is_lent_and_then_refuses(pool: _trt_pool.SlotPool) -> None:
    closer = threading.Thread(target=pool.close)
    with pool.lend(0, 1):
        closer.start()
        time.sleep(0.05)
        assert closer.is_alive()
    closer.join(60)
    assert not closer.is_alive()
    assert MadeSlot.alive == []
    pool.close()
    with pytest.raises(BackendError, match="this engine is closed"), pool.lend(0, 1):
        pass


def test_dropping_and_waiting_for_others(pool: _trt_pool.SlotPool) -> None:
    assert pool.drop_idle() == 0
    assert not pool.wait_for_others()
    with pool.lend(0, 1):
        pass
    assert pool.drop_idle() == 1
    assert MadeSlot.alive == []
    waiter = threading.Thread(target=pool.wait_for_others)
    with pool.lend(0, 1):
        waiter.start()
        time.sleep(0.05)
        assert waiter.is_alive()
    waiter.join(60)
    assert not waiter.is_alive()
