"""`orchd` that says whenever it vets a file, a minute from now."""

from __future__ import annotations

import sys
import time
from typing import Any

from engines.llamacpp import vet
from orchd.cli import main
from orchd.models import vetted

if __name__ == "__main__":
    really, now = vet.vet, time.time

    def loudly(spec: Any, **options: Any) -> Any:
        print(f"vetting {spec.path.name}", file=sys.stderr, flush=True)
        return really(spec, **options)

    vet.vet = loudly
    vetted.clock = lambda: now() + 60
    main()
