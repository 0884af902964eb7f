"""``orchd`` beside a made-up driver that shows two GPUs: ``python -m testkit.two_gpus serve ...``."""

from __future__ import annotations

import pytest

from orchd.cli import main
from testkit.nvml import FakeNvml

if __name__ == "__main__":
    FakeNvml().install(pytest.MonkeyPatch())
    main()
