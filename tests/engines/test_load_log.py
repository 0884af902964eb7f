"""What a device holds, read from llama.cpp's log: the lines are those of its three backends."""

from __future__ import annotations

import pytest

from engines.llamacpp.load_log import Buffers, Line

MIB = 2**20


@pytest.mark.parametrize("backend", ["CUDA", "Vulkan"])
def test_what_is_in_host_memory_is_not_the_devices(backend: str) -> None:
    lines = [
        "load_tensors:   CPU_Mapped model buffer size =    16.17 MiB",
        f"load_tensors:      {backend}0 model buffer size =    84.00 MiB",
        f"llama_context: {backend}_Host  output buffer size =     0.75 MiB",
        f"llama_kv_cache:    {backend}0 KV buffer size =    12.00 MiB",
        f"sched_reserve:    {backend}0 compute buffer size =     8.00 MiB",
        f"sched_reserve: {backend}_Host compute buffer size =     4.00 MiB",
    ]
    buffers = Buffers([Line(1, line) for line in lines])
    assert buffers.on_device == (84 + 12 + 8) * MIB
    assert buffers.of("KV") == 12 * MIB


def test_on_a_cpu_no_device_holds_anything() -> None:
    lines = [
        "CPU model buffer size = 9.0 MiB",
        "CPU_REPACK model buffer size = 9.0 MiB",
        "CPU KV buffer size = 1.0 MiB",
    ]
    assert Buffers([Line(1, line) for line in lines]).on_device == 0
