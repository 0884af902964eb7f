"""Home profile, section 1: security and access."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

import pytest

from orchd.errors import ConfigError
from orchd.settings.config import ServerConfig
from orchd.settings.sources import load
from testkit.live import Live, serving
from testkit.process import TOKEN
from tests.contract.forbidden import CONFIG_KEYS, METHODS, TENANTS
from tools.metrics_lint import pool_toml

DATA = (("POST", "/v1/tasks"), ("GET", "/v1/tasks/x/stream"))
CONTROL = (("POST", "/v1/pools/nowhere/reload"), ("GET", "/health"), ("GET", "/metrics"))


def listening_addresses(pid: int) -> set[str]:
    """Local addresses of a process's listening TCP sockets, in the kernel's hexadecimal."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            inodes.add(os.readlink(entry))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                found.add(fields[1].partition(":")[0])
    return found


@pytest.mark.home("HOME-1.1")
def test_the_process_listens_on_127_0_0_1_only(live: Live) -> None:
    assert ServerConfig().host == "127.0.0.1"
    assert listening_addresses(live.process.pid) == {"0100007F"}


@pytest.mark.home("HOME-1.1")
def test_no_other_address_of_the_machine_answers(live: Live) -> None:
    others = {address[4][0] for address in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    for address in {"127.0.0.2", *map(str, others)} - {"127.0.0.1"}:
        with pytest.raises(OSError), socket.create_connection((address, live.port), timeout=2):  # noqa: PT011
            pass


@pytest.mark.home("HOME-1.2")
@pytest.mark.parametrize(("method", "path"), DATA + CONTROL)
def test_every_route_wants_the_same_token(live: Live, method: str, path: str) -> None:
    assert live.request(method, path, token=None).status == 401
    assert live.request(method, path, token=TOKEN[:-1]).status == 401
    assert live.request(method, path, token=f"{TOKEN}x").status == 401
    assert live.request(method, path).status not in (401, 403)


@pytest.mark.home("HOME-1.3")
def test_the_token_comes_from_the_environment(live: Live) -> None:
    assert TOKEN in Path(f"/proc/{live.process.pid}/environ").read_text()
    assert live.request("GET", "/health").status == 200


@pytest.mark.home("HOME-1.3")
def test_the_token_comes_from_the_config_file(tmp_path: Path, models_folder: Path) -> None:
    toml = f"[server]\ntoken = 'from-the-file-0123456789'\n\n{pool_toml(models_folder / 'tiny-a.gguf')}"
    with serving(tmp_path, toml, token=None) as server:
        assert server.request("GET", "/health", token="from-the-file-0123456789").status == 200
        assert server.request("GET", "/health", token=TOKEN).status == 401


@pytest.mark.home("HOME-1.4")
@pytest.mark.parametrize("path", TENANTS)
def test_there_are_no_routes_for_tenants_roles_or_policies(live: Live, path: str) -> None:
    assert {live.request(method, path).status for method in METHODS} == {404}


@pytest.mark.home("HOME-1.4")
@pytest.mark.parametrize("field", ["tenant", "tenant_id", "user", "role", "org"])
def test_a_task_belongs_to_nobody(live: Live, field: str) -> None:
    answer = live.post(**{field: "acme"})
    assert answer.status == 400
    assert field in answer.json()["message"]


@pytest.mark.home("HOME-1.4")
def test_who_a_header_says_one_is_changes_nothing(live: Live) -> None:
    before = live.request("GET", "/metrics")
    claimed = {"X-Tenant-Id": "acme", "X-Org": "acme", "X-User": "root", "X-Roles": "admin", "X-Policy": "acme"}
    after = live.request("GET", "/metrics", headers=claimed)
    assert after.body == before.body
    assert after.headers.keys() == before.headers.keys()


@pytest.mark.home("HOME-1.4")
@pytest.mark.parametrize("text", [text for text in CONFIG_KEYS if "ten" in text or "rbac" in text or "token" in text])
def test_config_knows_no_tenants_and_no_second_token(tmp_path: Path, text: str) -> None:
    path = tmp_path / "orchd.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="unknown key"):
        load(config_path=path, flags={}, environ={}, cwd=tmp_path)
