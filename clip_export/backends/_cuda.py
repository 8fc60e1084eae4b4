"""The CUDA driver, through cuda-python: what GPU there is, and one place where every return code is read.

Nothing is loaded before it is asked for. A call that fails raises DeviceError with a sentence; one that fails for want
of memory raises GpuMemoryError, so that a caller can try with less.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from clip_export.errors import BackendError, DeviceError, MissingDependencyError

INSTALL: Final = "pip install 'clip-export[tensorrt-rtx]' (or [tensorrt])"
_KERNEL_DRIVER = Path("/proc/driver/nvidia/version")


class GpuMemoryError(DeviceError):
    """An allocation or a launch failed because the memory of the GPU does not suffice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU of this machine.

    `compute_capability` is as in "sm_89"; `driver` is the version of the kernel driver as in "580.65.06", None where it
    is not told; `cuda` is the newest CUDA that the driver runs, as in "13.0"; bytes are those of its memory, and
    `free_bytes` is None where it is not told either.
    """

    index: int
    name: str
    compute_capability: str
    driver: str | None
    cuda: str
    total_bytes: int
    free_bytes: int | None


def device_status(index: int = 0) -> Gpu:
    """GPU number `index` as it is now.

    Raises MissingDependencyError without cuda-python; DeviceError without a driver, with one that is too old, without
    a GPU, or where there is no GPU of that number.
    """
    _check_number(index)
    attribute = bindings().CUdevice_attribute
    handle = call("cuDeviceGet", index)
    major = call("cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, handle)
    minor = call("cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, handle)
    name = call("cuDeviceGetName", 256, handle)
    return Gpu(
        index=index,
        name=name.split(b"\0", 1)[0].decode(errors="replace"),
        compute_capability=f"sm_{int(major)}{int(minor)}",
        driver=_driver_version(),
        cuda=_cuda_version(),
        total_bytes=int(call("cuDeviceTotalMem", handle)),
        free_bytes=_free_bytes(index, handle),
    )


def device_index(device: str) -> int:
    """The number of the GPU that `cuda` or `cuda:N` names. Raises BackendError for anything else."""
    kind, colon, index = device.partition(":") if isinstance(device, str) else ("", "", "")
    if kind != "cuda" or (colon and not (index.isascii() and index.isdigit())):
        raise BackendError(f"expected device cuda:N, found {device!r}", hint="choose the number of a GPU, as in cuda:0")
    return int(index or 0)


class Device:
    """The primary context of one GPU: the one that torch and the CUDA runtime inside TensorRT use as well.

    It is kept until the process ends, since others may live in it. Make one with `open_device`.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self.handle = call("cuDeviceGet", index)
        self._context = call("cuDevicePrimaryCtxRetain", self.handle)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make this the GPU of the calling thread, and afterwards again what it was before."""
        call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            call("cuCtxPopCurrent")

    def free_bytes(self) -> int:
        """The memory that nobody holds, in bytes."""
        with self.current():
            free, _ = call("cuMemGetInfo")
        return int(free)


def open_device(index: int) -> Device:
    """GPU number `index`, ready to be used. Raises as `device_status` does."""
    _check_number(index)
    return _device(index)


@functools.cache
def bindings() -> Any:
    """The module cuda.bindings.driver. Raises MissingDependencyError."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        message = f"cuda-python cannot be imported, which moves data to and from the GPU: {error}"
        raise MissingDependencyError(message, hint=INSTALL) from error
    return driver


def call(name: str, *arguments: Any) -> Any:
    """Call one function of the driver, and return what it gives besides the status: None, one value or a tuple.

    Raises GpuMemoryError or DeviceError.
    """
    driver = bindings()
    try:
        status, *values = getattr(driver, name)(*arguments)
    except RuntimeError as error:  # the driver library, or this function of it, is not there
        if "not found" in str(error) and "Function" in str(error):
            message = f"the NVIDIA driver is too old: it has no {name}"
            raise DeviceError(message, hint="update the driver") from error
        raise _no_driver() from error
    if status != driver.CUresult.CUDA_SUCCESS:
        raise _failure(name, status)
    if not values:
        return None
    return values[0] if len(values) == 1 else tuple(values)


def _failure(name: str, status: Any) -> DeviceError:
    driver = bindings()
    result = driver.CUresult
    sentences = {
        result.CUDA_ERROR_NO_DEVICE: _no_gpu,
        result.CUDA_ERROR_STUB_LIBRARY: _no_driver,
        result.CUDA_ERROR_SYSTEM_DRIVER_MISMATCH: _reboot,
    }
    if status in sentences:
        return sentences[status]()
    if status == result.CUDA_ERROR_OUT_OF_MEMORY:
        return GpuMemoryError(
            f"the GPU is out of memory ({name})", hint="free GPU memory: nvidia-smi shows who holds it"
        )
    # After most failures of a kernel the context is lost, and every later call fails in the same way.
    return DeviceError(
        f"the GPU failed in {name}: {_described(status)}", hint="restart the program; nvidia-smi shows the GPU"
    )


def _described(status: Any) -> str:
    driver = bindings()
    _, text = driver.cuGetErrorString(status)
    name = getattr(status, "name", str(status))
    return f"{name}, {text.decode(errors='replace')}" if text else str(name)


@functools.cache
def _start_driver() -> None:
    """Start the driver once; what fails is tried again at the next call, since nothing raised is remembered."""
    call("cuInit", 0)
    found, wanted = int(call("cuDriverGetVersion")) // 1000, _bindings_major()
    if found < wanted:
        message = f"the NVIDIA driver is too old: it runs CUDA {_cuda_version()}, cuda-python here is for CUDA {wanted}"
        hint = f"update the driver, or pip install 'cuda-bindings<{wanted}' and libraries for CUDA {found}"
        raise DeviceError(message, hint=hint)


def _check_number(index: int) -> None:
    _start_driver()
    count = int(call("cuDeviceGetCount"))
    if count == 0:
        raise _no_gpu()
    if not 0 <= index < count:
        found = "one GPU, number 0" if count == 1 else f"{count} GPUs, numbers 0 to {count - 1}"
        raise DeviceError(f"there is no GPU number {index}: this machine has {found}", hint="choose one of these")


def _free_bytes(index: int, handle: Any) -> int | None:
    """The free memory of a GPU. A context is not made for this: it would hold hundreds of megabytes itself."""
    _, active = call("cuDevicePrimaryCtxGetState", handle)
    if active:
        return open_device(index).free_bytes()
    address = call("cuDeviceGetPCIBusId", 32, handle).split(b"\0", 1)[0].decode()
    found = _from_nvml(lambda system: system.Device(pci_bus_id=address).memory_info.free)
    return None if found is None else int(found)


def _from_nvml(ask: Callable[[Any], Any]) -> Any:
    """What the library that manages GPUs answers; None where it does not. It is information only."""
    try:
        from cuda.core import system
    except ImportError:
        return None
    # An older cuda-core has less of it, a container may not have the library; its own errors derive from Exception.
    failures = (AttributeError, RuntimeError, OSError, ValueError, TypeError)
    try:
        return ask(system)
    except (*failures, getattr(system, "NvmlError", RuntimeError)):
        return None


@functools.cache
def _device(index: int) -> Device:
    return Device(index)


def _bindings_major() -> int:
    from cuda import bindings as package

    return int(package.__version__.split(".")[0])


def _cuda_version() -> str:
    version = int(call("cuDriverGetVersion"))  # 1000 * major + 10 * minor
    return f"{version // 1000}.{version % 1000 // 10}"


def _driver_version() -> str | None:
    """The version of the kernel driver, from NVML, or where that is not installed from the kernel."""
    numbers = _from_nvml(lambda system: system.get_kernel_mode_driver_version())
    if numbers:
        return ".".join(f"{part:02d}" if place == 2 else str(part) for place, part in enumerate(numbers))
    try:
        text = _KERNEL_DRIVER.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    words = [word for word in text.split("\n", 1)[0].split() if word[0].isdigit() and "." in word]
    return words[0] if words else None


def _no_driver() -> DeviceError:
    return DeviceError(
        "there is no NVIDIA driver on this machine: libcuda was not found",
        hint="install the NVIDIA driver (in a container: start it with --gpus all), or use backend onnxruntime",
    )


def _no_gpu() -> DeviceError:
    return DeviceError(
        "the NVIDIA driver finds no GPU",
        hint="check nvidia-smi and CUDA_VISIBLE_DEVICES (in a container: --gpus all), or use backend onnxruntime",
    )


def _reboot() -> DeviceError:
    return DeviceError(
        "the NVIDIA driver's library and its kernel module are of different versions", hint="restart the machine"
    )


__all__ = ["Device", "Gpu", "GpuMemoryError", "bindings", "call", "device_index", "device_status", "open_device"]
