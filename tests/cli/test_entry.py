"""Where the command line begins."""

from __future__ import annotations

import os
import ssl

import pytest

from orchd.cli.entry import expect_no_tls


def test_no_command_reads_the_systems_certificates(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # put back at the end
    expect_no_tls()
    assert ssl.create_default_context().cert_store_stats()["x509"] == 0
