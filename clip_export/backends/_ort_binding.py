"""ONNX Runtime's I/O binding: device arrays in, device arrays out, nothing copied that need not be.

A binding belongs to one call, so threads share nothing. ONNX Runtime computes on a stream of its own that does not wait
for anyone's; what a caller still computes on the device is waited for before it is read. When `run` returns, its
outputs are complete.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from clip_export.backends import _cuda
from clip_export.backends.device_array import contiguous, is_device_array
from clip_export.errors import BackendError

if TYPE_CHECKING:
    import onnxruntime

# ONNX Runtime's names of tensor types, as far as graphs here use them and numpy has them.
_DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(int32)": np.dtype(np.int32),
    "tensor(int64)": np.dtype(np.int64),
    "tensor(uint8)": np.dtype(np.uint8),
}


def run_bound(
    session: onnxruntime.InferenceSession, feeds: Mapping[str, Any], outputs: Sequence[str], *, device: str, index: int
) -> dict[str, onnxruntime.OrtValue]:
    """Run with `outputs` left on `device` (`cpu`, `cuda`) number `index`; OrtValues by output name.

    `feeds` are numpy arrays or arrays on that GPU. Raises BackendError for anything else, and what the session raises.
    """
    binding = session.io_binding()
    kept = [_bind(binding, name, value, index) for name, value in feeds.items()]
    for name in outputs:
        binding.bind_output(name, device, index)
    if any(is_device_array(value) for value in feeds.values()):
        with _cuda.open_device(index).current():  # it waits for the device that is current in this thread
            binding.synchronize_inputs()  # for all of it, and so for whoever computes these arrays
    session.run_with_iobinding(binding)
    del kept  # the inputs had to live until here
    return dict(zip(outputs, binding.get_outputs(), strict=True))


def dtype_of(value: onnxruntime.OrtValue) -> np.dtype[Any]:
    """The numpy dtype of an OrtValue. Raises BackendError where numpy has none."""
    name = value.data_type()
    if name not in _DTYPES:
        raise BackendError(f"an output of {name} cannot be handed over, only {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _bind(binding: onnxruntime.IOBinding, name: str, value: Any, index: int) -> object:
    """Bind one input; returns what has to live until the run is over."""
    if isinstance(value, np.ndarray):
        array = np.ascontiguousarray(value)
        binding.bind_cpu_input(name, array)
        return array
    if not is_device_array(value):
        found = type(value).__name__
        raise BackendError(f"{name}: expected a numpy array or an array on a GPU, found {found}")
    if not hasattr(value, "__cuda_array_interface__"):
        imported = _from_dlpack(name, value)
        binding.bind_ortvalue_input(name, imported)
        return value, imported
    interface = value.__cuda_array_interface__
    if not _contiguous(interface):
        hint = "call .contiguous() on it (torch), or ascontiguousarray (CuPy)"
        raise BackendError(f"{name}: expected an array without gaps, found strides {interface['strides']}", hint=hint)
    shape, pointer = list(interface["shape"]), int(interface["data"][0])
    binding.bind_input(name, "cuda", index, np.dtype(interface["typestr"]).type, shape, pointer)
    return value


def _from_dlpack(name: str, value: Any) -> Any:
    import onnxruntime

    if not hasattr(onnxruntime.OrtValue, "from_dlpack"):
        message = f"{name}: this ONNX Runtime cannot take DLPack arrays, only those with __cuda_array_interface__"
        raise BackendError(message, hint="upgrade onnxruntime-gpu, or hand over numpy arrays")
    return onnxruntime.OrtValue.from_dlpack(value)


def _contiguous(interface: Mapping[str, Any]) -> bool:
    """Whether the array has no gaps; its strides are None or in bytes."""
    if interface.get("strides") is None:
        return True
    itemsize = np.dtype(interface["typestr"]).itemsize
    strides = [divmod(stride, itemsize) for stride in interface["strides"]]
    return all(not rest for _, rest in strides) and contiguous(interface["shape"], [whole for whole, _ in strides])
