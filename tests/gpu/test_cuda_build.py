"""How CMake decides about CUDA, with a made-up nvidia-smi, toolkit, g++ and df; and, slowly, the real compiler."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.box import CMAKE, ROOT, Box

BOTH = "8.9, 580.65.06, NVIDIA GeForce RTX 4090\n8.6, 580.65.06, NVIDIA GeForce RTX 3060"


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


WHEELS = {"ORCHD_CUDA_FROM_PYPI": "ON"}  # this machine's own toolkit, if there is one, is not asked


# --- what is here ----------------------------------------------------------------------------------------------------


no_driver = pytest.mark.skipif(Path("/proc/driver/nvidia/version").exists(), reason="there is a driver here")


@no_driver
def test_without_a_driver_it_is_the_cpu_and_says_why(box: Box) -> None:
    said = box.says()
    assert "Backend: CPU, because no NVIDIA driver was found (no nvidia-smi, no libcuda.so.1" in said
    assert "args= key=CUDA dir= compiler= runtime=" in said


@no_driver
def test_without_a_driver_asking_for_cuda_needs_an_architecture(box: Box) -> None:
    said = box.says(ORCHD_BACKEND="cuda")
    assert "CUDA was requested, but no NVIDIA driver was found" in said
    assert "set its compute capability: -DORCHD_CUDA_ARCHITECTURES=86" in said


def test_nothing_else_is_a_backend(box: Box) -> None:
    assert "ORCHD_BACKEND is 'rocm'; it must be auto, cpu, cuda or vulkan." in box.says(ORCHD_BACKEND="rocm")


def test_without_a_toolkit_the_compiler_comes_from_pypi_for_exactly_these_gpus(box: Box) -> None:
    box.nvidia_smi(BOTH)
    said = box.says(**WHEELS)
    assert "Backend: CUDA 13.0.88 for compute capability 86, 89 (NVIDIA GeForce RTX 4090, NVIDIA" in said
    decided = box.decided(**WHEELS)
    assert "-DCMAKE_CUDA_ARCHITECTURES=86;89 " in decided["args"]
    assert f"-DCMAKE_CUDA_COMPILER={box.folder}/build/cuda-13.0/nvidia/cu13/bin/nvcc " in decided["args"]
    assert "-DORCHD_CUDA_RPATH=nvidia/cu13/lib" in decided["args"]
    assert decided["compiler"] == f"{ROOT}/cmake/cuda13_compiler.txt"
    assert decided["runtime"] == f"{ROOT}/cmake/cuda13_runtime.txt"


def test_the_architectures_that_are_named_win(box: Box) -> None:
    box.nvidia_smi(BOTH)
    assert "-DCMAKE_CUDA_ARCHITECTURES=90 " in box.decided(**WHEELS, ORCHD_CUDA_ARCHITECTURES="90")["args"]


def test_building_for_a_gpu_elsewhere_needs_no_driver(box: Box) -> None:
    decided = box.decided(**WHEELS, ORCHD_BACKEND="cuda", ORCHD_CUDA_ARCHITECTURES="90")
    assert "-DGGML_CUDA=ON -DGGML_CUDA_NCCL=OFF -DGGML_CUDA_NO_VMM=ON " in decided["args"]


def test_the_drivers_own_library_is_linked_where_it_is(box: Box) -> None:
    box.nvidia_smi(BOTH)
    (box.folder / "lib").mkdir()
    (box.folder / "lib" / "libcuda.so.1").touch()
    box.environ["CMAKE_LIBRARY_PATH"] = str(box.folder / "lib")
    args = box.decided(**WHEELS)["args"]
    assert f"-DCUDA_cuda_driver_LIBRARY={box.folder}/lib/libcuda.so.1 " in args
    assert "NO_VMM" not in args


def test_a_driver_that_shows_no_gpu_is_told_in_its_own_words(box: Box) -> None:
    box.nvidia_smi("No devices were found", 6)
    said = box.says(**WHEELS)
    assert "CPU, although this machine has an NVIDIA driver, because nvidia-smi finds no GPU" in said
    assert "(it says: No devices were found)" in said


def test_the_key_of_a_cached_wheel_tells_cuda_from_cpu_and_one_compiler_from_another(box: Box) -> None:
    box.nvidia_smi(BOTH)
    cuda, cpu = box.decided(**WHEELS), box.decided(ORCHD_BACKEND="cpu")
    assert cuda["args"] != cpu["args"] == ""
    assert cuda["key"] != cpu["key"]


# --- what does not work ----------------------------------------------------------------------------------------------


def test_a_driver_that_is_too_old_is_told_which_one_would_do(box: Box) -> None:
    box.nvidia_smi("8.9, 570.86.10, NVIDIA GeForce RTX 4090")
    for said in (box.says(**WHEELS), box.says(**WHEELS, ORCHD_BACKEND="cuda")):
        assert (
            "the driver 570.86.10 is too old for CUDA 13.0.88, which needs 580 or newer (Ubuntu: apt install "
            "nvidia-driver-580). Otherwise install a complete toolkit that fits, such as CUDA 12" in said
        )


def test_a_gpu_that_is_too_old_for_the_compiler(box: Box) -> None:
    box.nvidia_smi("6.1, 580.65.06, NVIDIA GeForce GTX 1080")
    said = box.says(**WHEELS)
    assert "CUDA 13.0.88 does not compile for compute capability 61, only for 75 to 121" in said
    assert "or build for Vulkan, which serves older cards too, with BACKEND=vulkan" in said


def test_a_compiler_that_is_too_new(box: Box) -> None:
    box.nvidia_smi(BOTH)
    box.gcc("16")
    said = box.says(**WHEELS)
    assert "because g++ 16 is too new; CUDA 13.0.88 works with g++ 15 at most" in said
    assert "(Debian and Ubuntu: apt install g++-15)" in said


def test_an_older_compiler_beside_it_is_used(box: Box) -> None:
    box.nvidia_smi(BOTH)
    box.gcc("16")
    older = box.gcc("14", "g++-14")
    assert f"-DCMAKE_CUDA_HOST_COMPILER={older} " in box.decided(**WHEELS)["args"]


def test_a_compiler_that_is_old_enough_needs_no_word(box: Box) -> None:
    box.nvidia_smi(BOTH)
    box.gcc("15")
    assert "CMAKE_CUDA_HOST_COMPILER" not in box.decided(**WHEELS)["args"]


# --- an installed toolkit --------------------------------------------------------------------------------------------

WHOLE = ("cudart", "cublas", "cuda")


def test_a_whole_toolkit_is_taken_as_it_is(box: Box) -> None:
    box.nvidia_smi("8.9, 570.86.10, NVIDIA GeForce RTX 4090")
    home = box.toolkit("12.8.93", libraries=WHOLE, architectures="75 86 89", newest_gcc=14)
    decided = box.decided()
    assert f"-DCMAKE_CUDA_COMPILER={home}/bin/nvcc " in decided["args"]
    assert f"-DORCHD_CUDA_RPATH={home}/lib64" in decided["args"]
    assert "NO_VMM" not in decided["args"]
    assert (decided["dir"], decided["compiler"], decided["runtime"]) == ("", "", "")


@pytest.mark.parametrize(
    ("version", "major", "rpath"),
    [("12.8.93", 12, "nvidia/cublas/lib;nvidia/cuda_runtime/lib"), ("13.0.88", 13, "nvidia/cu13/lib")],
)
def test_a_toolkit_without_cublas_gets_that_alone(box: Box, version: str, major: int, rpath: str) -> None:
    box.nvidia_smi(BOTH)
    home = box.toolkit(version, libraries=("cudart",), architectures="75 86 89", newest_gcc=14)
    decided = box.decided()
    assert f"-DCMAKE_CUDA_COMPILER={home}/bin/nvcc " in decided["args"]
    assert f"-DCUDA_cublas_LIBRARY={box.folder}/build/cublas-{major}/nvidia/" in decided["args"]
    assert decided["args"].endswith(f"-DORCHD_CUDA_RPATH={rpath}")
    assert (decided["compiler"], decided["runtime"]) == ("", f"{ROOT}/cmake/cuda{major}_runtime.txt")


def test_a_toolkit_that_cannot_do_it_is_replaced_and_the_reason_is_said(box: Box) -> None:
    box.nvidia_smi("12.0, 580.65.06, NVIDIA GeForce RTX 5090")
    box.toolkit("11.8.89", libraries=WHOLE, architectures="75 86 89", newest_gcc=11)
    said = box.says()
    assert "Backend: CUDA 13.0.88 for compute capability 120" in said
    assert "because CUDA 11.8.89 does not compile for compute capability 120, only for 75 to 89" in said


def test_where_neither_will_do_both_reasons_are_said(box: Box) -> None:
    box.nvidia_smi("8.9, 515.43.04, NVIDIA GeForce RTX 4090")
    box.toolkit("12.8.93", libraries=WHOLE, architectures="75 86 89", newest_gcc=14)
    said = box.says()
    assert "the driver 515.43.04 is too old for CUDA 12.8.93, which needs 525 or newer" in said
    assert "and from PyPI: the driver 515.43.04 is too old for CUDA 13.0.88, which needs 580" in said


# --- the disk --------------------------------------------------------------------------------------------------------


def disk(box: Box, free_mb: int, needs_mb: int) -> str:
    blocks = f"/dev/x 9999999 1 {free_mb * 1024} 1% /"
    box.program("df", f'echo "Filesystem 1024-blocks Used Available Capacity Mounted on"\necho "{blocks}"')
    script = box.folder / "check.cmake"
    script.write_text(
        f"include({ROOT}/cmake/disk.cmake)\norchd_check_disk({box.folder}/not/yet/there {needs_mb} [[the toolkit]])\n"
    )
    done = subprocess.run(
        [CMAKE, "-P", script], env={"PATH": str(box.folder / "bin")}, capture_output=True, text=True, check=False
    )
    return " ".join((done.stdout + done.stderr).split())


def test_a_disk_that_is_too_full_is_seen_before_anything_is_fetched(box: Box) -> None:
    said = disk(box, 900, 1500)
    assert f"Not enough disk space: the toolkit needs 1500 MB in {box.folder}, but only 900 MB are free." in said
    assert disk(box, 1500, 1500) == ""


# --- the real thing --------------------------------------------------------------------------------------------------

LINKED = """\
cmake_minimum_required(VERSION 3.21)
project(llama_cpp LANGUAGES C CXX CUDA)
find_package(CUDAToolkit REQUIRED)
set(CMAKE_INSTALL_RPATH_USE_LINK_PATH ON)
set(ggml GGML/ggml)
add_library(ggml-cuda SHARED ${ggml}/src/ggml-cuda/norm.cu)
target_include_directories(ggml-cuda PRIVATE ${ggml}/include ${ggml}/src ${ggml}/src/ggml-cuda)
target_link_libraries(ggml-cuda PRIVATE CUDA::cudart CUDA::cublas)
target_link_options(ggml-cuda PRIVATE -Wl,--no-as-needed)
set_target_properties(ggml-cuda PROPERTIES CUDA_STANDARD 17 INSTALL_RPATH $ORIGIN BUILD_WITH_INSTALL_RPATH ON)
"""
"""One file of ggml's CUDA backend with that backend's own link line, and llama-cpp-python's own runtime path."""


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("source", ["pypi", "own"])
def test_a_file_of_ggmls_cuda_backend_compiles_and_links(tmp_path: Path, source: str) -> None:
    """Fetches 0.5 GB and compiles for minutes: only where ORCHD_TEST_CUDA_BUILD names the folder to do it in."""
    folder = os.environ.get("ORCHD_TEST_CUDA_BUILD")
    if folder is None:
        pytest.skip("set ORCHD_TEST_CUDA_BUILD to a folder with 3 GB of room that may be kept between runs")
    if source == "own" and shutil.which("nvcc") is None:
        pytest.skip("there is no nvcc here")
    build = Path(folder) / source
    pypi = "ON" if source == "pypi" else "OFF"
    options = [
        "-DORCHD_BACKEND=cuda",
        "-DORCHD_CUDA_ARCHITECTURES=90",
        f"-DORCHD_CUDA_FROM_PYPI={pypi}",
        f"-DORCHD_PYTHON={sys.executable}",
    ]
    subprocess.run([CMAKE, "-S", ROOT, "-B", build, *options], check=True)
    for script in ("fetch_source", "assemble_cuda"):
        subprocess.run(
            [CMAKE, f"-DORCHD_SETTINGS={build}/settings.cmake", "-P", ROOT / "cmake" / f"{script}.cmake"], check=True
        )
    settings = (build / "settings.cmake").read_text()
    [args] = re.findall(r"set\(ORCHD_LLAMA_ARGS \[\[(.*)\]\]\)", settings)
    [llama] = re.findall(r"set\(ORCHD_LLAMA_SOURCE \[\[(.*)\]\]\)", settings)
    (tmp_path / "CMakeLists.txt").write_text(LINKED.replace("GGML", f"{llama}/vendor/llama.cpp"))
    subprocess.run([CMAKE, "-S", tmp_path, "-B", tmp_path / "made", *args.split(" ")], check=True)
    subprocess.run([CMAKE, "--build", tmp_path / "made"], check=True)
    dynamic = subprocess.run(
        ["readelf", "--dynamic", tmp_path / "made" / "libggml-cuda.so"], capture_output=True, text=True, check=True
    ).stdout
    assert re.search(r"R(UN)?PATH.*\[\$ORIGIN:\$ORIGIN/\.\./\.\./nvidia/cu13/lib\]", dynamic)

    # As in an environment: where install_wheel.cmake puts things, and nothing said about where they are.
    site = tmp_path / "site-packages"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    pip += ["--require-hashes", "--find-links", str(build / "cuda-wheels"), "--target", str(site)]
    subprocess.run([*pip, "--requirement", str(ROOT / "cmake" / "cuda13_runtime.txt")], check=True)
    library = site / "llama_cpp" / "lib" / "libggml-cuda.so"
    library.parent.mkdir(parents=True)
    shutil.copy(tmp_path / "made" / "libggml-cuda.so", library)
    found = subprocess.run(["ldd", library], env={}, capture_output=True, text=True, check=True).stdout
    assert "not found" not in found
    for name in ("libcudart.so.13", "libcublas.so.13", "libcublasLt.so.13"):
        [where] = re.findall(rf"{re.escape(name)} => (\S+)", found)
        assert Path(where).resolve() == (site / "nvidia" / "cu13" / "lib" / name).resolve()
