"""Which of the GPUs that llama.cpp lists is meant."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from llama_cpp import _ggml

from engines.api import DeviceSpec
from engines.errors import LoadFailed
from engines.llamacpp.build import gpu_backend

_GPU, _INTEGRATED_GPU = 1, 2
_ggml_library: Any = _ggml.libggml
for _name in ("ggml_backend_dev_get", "ggml_backend_dev_backend_reg"):
    getattr(_ggml_library, _name).restype = ctypes.c_void_p
_ggml_library.ggml_backend_dev_count.restype = ctypes.c_size_t
_ggml_library.ggml_backend_reg_name.restype = ctypes.c_char_p


class Listed(NamedTuple):
    """A GPU in llama.cpp's list.

    Attributes:
        name: The product.
        pci: Its PCI address, such as ``0000:01:00.0``; empty if the driver does not say.
    """

    name: str
    pci: str


class _Properties(ctypes.Structure):
    """``ggml_backend_dev_props``; of what it can do at the end there may be more."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("description", ctypes.c_char_p),
        ("memory_free", ctypes.c_size_t),
        ("memory_total", ctypes.c_size_t),
        ("kind", ctypes.c_int),
        ("device_id", ctypes.c_char_p),
        ("can", ctypes.c_ubyte * 64),
    )


def index_of(device: DeviceSpec) -> int | None:
    """A device's index in llama.cpp's list of GPUs; None for a CPU.

    Raises:
        LoadFailed: Vulkan does not show this GPU.
    """
    if device.kind == "cpu":
        return None
    # CUDA counts as CUDA_VISIBLE_DEVICES says.
    return match(device, list(_vulkan_gpus())) if gpu_backend() == "Vulkan" else device.ordinal


def match(device: DeviceSpec, listed: Sequence[Listed]) -> int:
    """The index of the GPU with the device's PCI address; where no address is known, its ordinal.

    Raises:
        LoadFailed: It is not listed.
    """
    addresses = [gpu.pci for gpu in listed]
    if not any(addresses) and device.ordinal < len(listed):
        return device.ordinal
    if device.pci in addresses:
        return addresses.index(device.pci)
    shown = ", ".join(f"{gpu.name} at {gpu.pci or 'no address'}" for gpu in listed)
    raise LoadFailed(
        f"Vulkan shows no GPU at PCI address {device.pci or 'unknown'}, only: {shown or 'none'}; install the NVIDIA "
        "driver's Vulkan part (Ubuntu: libnvidia-gl of the driver's version), and look at vulkaninfo --summary"
    )


def _vulkan_gpus() -> Iterator[Listed]:
    """In llama.cpp's order, which lists integrated GPUs only where there are no others."""
    found: dict[int, list[Listed]] = {_GPU: [], _INTEGRATED_GPU: []}
    for index in range(_ggml_library.ggml_backend_dev_count()):
        device = ctypes.c_void_p(_ggml_library.ggml_backend_dev_get(ctypes.c_size_t(index)))
        backend = ctypes.c_void_p(_ggml_library.ggml_backend_dev_backend_reg(device))
        if _ggml_library.ggml_backend_reg_name(backend) != b"Vulkan":
            continue
        properties = _Properties()
        _ggml_library.ggml_backend_dev_get_props(device, ctypes.byref(properties))
        if properties.kind in found:
            found[properties.kind].append(
                Listed(properties.description.decode("utf-8", "replace"), (properties.device_id or b"").decode())
            )
    yield from found[_GPU] or found[_INTEGRATED_GPU]
