"""How CMake decides about Vulkan, with made-up headers, loader and shader compiler."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu.box import ROOT, Box


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


def install(box: Box, *packages: str, headers: int = 280) -> None:
    """What Debian's packages of these names bring."""
    home = box.folder / "usr"
    box.environ["CMAKE_PREFIX_PATH"] = str(home)
    files = {
        "libvulkan-dev": {
            "include/vulkan/vulkan.h": "",
            "include/vulkan/vulkan.hpp": "",
            "include/vulkan/vulkan_core.h": f"#define VK_HEADER_VERSION {headers}\n"
            "#define VK_HEADER_VERSION_COMPLETE VK_MAKE_API_VERSION(0, 1, 3, VK_HEADER_VERSION)\n",
            "lib/libvulkan.so": "",
        },
        "spirv-headers": {"share/cmake/SPIRV-Headers/SPIRV-HeadersConfig.cmake": ""},
        "glslc": {},
    }
    for package in packages:
        for name, text in files[package].items():
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).write_text(text)
    if "glslc" in packages:
        box.program("glslc", "echo shaderc v2023.8")


WHOLE = ("libvulkan-dev", "glslc", "spirv-headers")


def test_vulkan_is_built_where_it_is_asked_for(box: Box) -> None:
    install(box, *WHOLE)
    assert "Backend: Vulkan 1.3.280, as requested." in box.says(ORCHD_BACKEND="vulkan")
    decided = box.decided(ORCHD_BACKEND="vulkan")
    assert decided["name"] == "Vulkan"
    assert decided["args"] == f"-DGGML_VULKAN=ON -DCMAKE_PROJECT_ggml_INCLUDE={ROOT}/cmake/llama_vulkan.cmake"
    assert (decided["dir"], decided["compiler"], decided["runtime"]) == ("", "", "")


def test_its_wheel_has_a_place_of_its_own_in_the_cache(box: Box) -> None:
    install(box, *WHOLE)
    key = box.decided(ORCHD_BACKEND="vulkan")["key"]
    assert key == "Vulkan 1.3.280"
    assert key != box.decided(ORCHD_BACKEND="cpu")["key"]
    install(box, *WHOLE, headers=290)
    assert box.decided(ORCHD_BACKEND="vulkan")["key"] == "Vulkan 1.3.290"
    said = box.says(ORCHD_BACKEND="vulkan")
    assert "glslc shaderc v2023.8 llama_vulkan.cmake sha256:" in said
    assert "vulkan_older_headers.h sha256:" in said


@pytest.mark.parametrize(
    ("package", "words"),
    [
        ("libvulkan-dev", "Vulkan's loader and headers for C++"),
        ("glslc", "the shader compiler glslc"),
        ("spirv-headers", "SPIR-V's headers"),
    ],
)
def test_what_is_missing_is_named_with_its_package(box: Box, package: str, words: str) -> None:
    install(box, *(one for one in WHOLE if one != package))
    said = box.says(ORCHD_BACKEND="vulkan")
    assert (
        f"Vulkan was requested, but this machine lacks {words} (Debian and Ubuntu: sudo apt install {package})." in said
    )


def test_all_that_is_missing_is_named_at_once(box: Box) -> None:
    assert "sudo apt install libvulkan-dev glslc spirv-headers)." in box.says(ORCHD_BACKEND="vulkan")


def test_headers_that_are_too_old_are_named_with_their_version(box: Box) -> None:
    install(box, *WHOLE, headers=204)
    said = box.says(ORCHD_BACKEND="vulkan")
    assert "are those of Vulkan 1.3.204, and 1.3.239 is the oldest version" in said


def test_nobody_gets_vulkan_without_asking(box: Box) -> None:
    install(box, *WHOLE)
    assert "Vulkan" not in box.decided()["name"]
