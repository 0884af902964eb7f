"""The cuBLAS that llama.cpp's CUDA backend finds, which may be a bundle's stand-in, multiplies as NumPy does."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.gpu.device import ON_GPU, check_device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(120),
    pytest.mark.skipif(not ON_GPU, reason="there is nothing of it on a CPU"),
]

R_32F, R_16F, COMPUTE_32F, DEFAULT = 0, 2, 68, -1
TYPES = {R_32F: np.float32, R_16F: np.float16}
TO_DEVICE, TO_HOST = 1, 2


class Cuda:
    """The libraries beside llama.cpp's CUDA backend, and a handle of cuBLAS."""

    def __init__(self) -> None:
        check_device()
        import llama_cpp  # loads the backend and what it is linked to

        folder = Path(llama_cpp.__file__).parents[1] / "nvidia" / "cu13" / "lib"
        self.runtime = ctypes.CDLL("libcudart.so.13" if not folder.is_dir() else str(folder / "libcudart.so.13"))
        self.blas = ctypes.CDLL("libcublas.so.13" if not folder.is_dir() else str(folder / "libcublas.so.13"))
        self.handle = ctypes.c_void_p()
        assert self.blas.cublasCreate_v2(ctypes.byref(self.handle)) == 0

    def put(self, values: npt.NDArray[Any]) -> ctypes.c_void_p:
        """A copy on the device."""
        at = ctypes.c_void_p()
        assert self.runtime.cudaMalloc(ctypes.byref(at), ctypes.c_size_t(values.nbytes)) == 0
        data = values.ctypes.data_as(ctypes.c_void_p)
        assert self.runtime.cudaMemcpy(at, data, ctypes.c_size_t(values.nbytes), TO_DEVICE) == 0
        return at

    def get(self, at: ctypes.c_void_p, like: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """What the device has there, of this shape."""
        found = np.empty_like(like)
        data = found.ctypes.data_as(ctypes.c_void_p)
        assert self.runtime.cudaMemcpy(data, at, ctypes.c_size_t(found.nbytes), TO_HOST) == 0
        assert self.runtime.cudaFree(at) == 0
        return found


@pytest.fixture(scope="module")
def cuda() -> Cuda:
    return Cuda()


@pytest.mark.parametrize("kind", [R_32F, R_16F])
@pytest.mark.parametrize(("rows", "columns", "inner"), [(1, 1, 1), (33, 17, 50), (128, 70, 256)])
def test_matrices_of_a_batch_are_multiplied(cuda: Cuda, kind: int, rows: int, columns: int, inner: int) -> None:
    """As llama.cpp asks for it: the first one transposed, all of them stored by columns."""
    chance = np.random.default_rng(inner)
    weights = chance.standard_normal((3, rows, inner)).astype(TYPES[kind])
    inputs = chance.standard_normal((3, columns, inner)).astype(TYPES[kind])
    result = np.ones((3, columns, rows), TYPES[kind])
    a, b, c = cuda.put(weights), cuda.put(inputs), cuda.put(result)
    one, half = ctypes.c_float(1), ctypes.c_float(0.5)
    sizes = [ctypes.c_longlong(rows * inner), ctypes.c_longlong(columns * inner), ctypes.c_longlong(rows * columns)]
    status = cuda.blas.cublasGemmStridedBatchedEx(
        cuda.handle, 1, 0, rows, columns, inner, ctypes.byref(one), a, kind, inner, sizes[0], b, kind, inner, sizes[1],
        ctypes.byref(half), c, kind, rows, sizes[2], 3, COMPUTE_32F, DEFAULT,
    )  # fmt: skip
    assert status == 0
    expected = np.einsum("bri,bci->bcr", weights.astype(np.float64), inputs.astype(np.float64)) + 0.5
    assert cuda.get(c, result).astype(np.float64) == pytest.approx(expected, rel=0.02, abs=0.05)
    for at in (a, b):
        cuda.runtime.cudaFree(at)


def test_a_triangular_system_is_solved(cuda: Cuda) -> None:
    chance = np.random.default_rng(1)
    size, rows = 24, 300
    triangle = np.triu(chance.standard_normal((size, size)) * 0.1 + np.eye(size)).astype(np.float32)
    x = chance.standard_normal((rows, size)).astype(np.float32)
    right = x @ triangle
    a, b = cuda.put(np.asfortranarray(triangle).ravel("F")), cuda.put(right.ravel("F"))
    pointers = cuda.put(np.array([a.value, b.value], np.uint64))
    assert pointers.value is not None
    one = ctypes.c_float(1)
    status = cuda.blas.cublasStrsmBatched(
        cuda.handle, 1, 1, 0, 0, rows, size, ctypes.byref(one), pointers, size,
        ctypes.c_void_p(pointers.value + 8), rows, 1,
    )  # fmt: skip
    assert status == 0
    assert cuda.get(b, right.ravel("F")).reshape((rows, size), order="F") == pytest.approx(x, abs=1e-2)
