"""What needs a Python that not all of the matrix is."""

from __future__ import annotations

import sys

collect_ignore = [] if sys.version_info >= (3, 11) else ["test_openapi_fuzz.py"]  # Schemathesis begins there
