"""Who gets in: the token, the Host, the origin, and that the token is never written down."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from testkit.harness import TOKEN, Running, new_id, serving
from tests.http.envelope import assert_envelope

ROUTES = [
    ("POST", "/v1/tasks"),
    ("GET", f"/v1/tasks/{new_id()}/stream"),
    ("POST", "/v1/pools/nope/reload"),
    ("GET", "/health"),
    ("GET", "/metrics"),
]
STREAM = ROUTES[1]


async def test_a_wrong_token_is_told_as_wrong_and_a_missing_one_as_missing(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path) as server:
        for headers, told in ({}, "is missing"), ({"Authorization": "Bearer not-the-token-0123"}, "is wrong"):
            answer = await server.request("GET", "/health", token=None, headers=headers)
            assert told in assert_envelope(answer, 401, "UNAUTHORIZED")


NOT_THE_TOKEN = {
    "none": {},
    "wrong": {"Authorization": "Bearer another-token-0123456789"},
    "empty": {"Authorization": "Bearer "},
    "only the scheme": {"Authorization": "Bearer"},
    "blank": {"Authorization": ""},
    "half of it": {"Authorization": f"Bearer {TOKEN[:-1]}"},
    "more than it": {"Authorization": f"Bearer {TOKEN}0"},
    "twice": {"Authorization": f"Bearer {TOKEN} {TOKEN}"},
    "another case": {"Authorization": f"Bearer {TOKEN.upper()}"},
    "Basic": {"Authorization": f"Basic {TOKEN}"},
    "no scheme": {"Authorization": TOKEN},
    "not ASCII": {"Authorization": "Bearer ü"},
    "another header": {"X-Api-Key": TOKEN},
    "a cookie": {"Cookie": f"access_token={TOKEN}"},
}
HOSTS_OF_THIS_MACHINE = [
    "localhost:8737",
    "LOCALHOST",
    "127.0.0.1",
    "127.0.0.1:1",
    "[::1]:8737",
    "[::1]",
    "a.localhost",
    "localhost.",
    "[0:0::1]:8737",
]
FOREIGN_HOSTS = [
    "evil.com",
    "evil.com:8737",
    "127.0.0.1.evil.com",
    "localhost.evil.com",
    "notlocalhost",
    "127.0.0.1@evil.com",
    "0.0.0.0",
    "[::]",
    "192.168.1.2:8737",
    "127.0.0.1:80:80",
    "127.0.0.1:99999",
    "evil.com@127.0.0.1",
    "localhost/evil.com",
    "localhost\\evil.com",
    "localhost..",
    "[127.0.0.1",
    "[localhost]",
    "[::1",
    "[::1]evil.com",
    "[::1].evil.com",
    "ｌocalhost.evil",
    "",
]
LOOPBACK_ORIGINS = ["http://localhost:3000", "http://127.0.0.1", "https://localhost", "http://[::1]:5173"]
FOREIGN_ORIGINS = ["https://evil.com", "http://localhost.evil.com", "null", "file://", "http://192.168.1.2", "x", ""]
PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}


# --- the token -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("headers", NOT_THE_TOKEN.values(), ids=NOT_THE_TOKEN)
async def test_every_route_wants_the_token(tiny_model_path: Path, headers: dict[str, str]) -> None:
    async with serving(tiny_model_path) as server:
        for method, path in [*ROUTES, ("GET", "/nowhere"), ("DELETE", "/health")]:
            answer = await server.request(method, path, token=None, headers=headers)
            assert "Authorization: Bearer" in assert_envelope(answer, 401, "UNAUTHORIZED")
            assert answer.headers["WWW-Authenticate"] == 'Bearer realm="orchd"'
        assert await server.total("tasks_rejected_total") == 0


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
async def test_the_token_opens_every_route(tiny_model_path: Path, scheme: str) -> None:
    async with serving(tiny_model_path) as server:
        status = {
            path: (
                await server.request(method, path, token=None, headers={"Authorization": f"{scheme} {TOKEN}"})
            ).status
            for method, path in ROUTES
        }
    assert list(status.values()) == [400, 404, 404, 200, 200]


@pytest.mark.parametrize(("method", "path"), [route for route in ROUTES if route != STREAM])
async def test_a_token_in_the_query_opens_nothing_but_the_stream(tiny_model_path: Path, method: str, path: str) -> None:
    async with serving(tiny_model_path) as server:
        answer = await server.request(method, f"{path}?access_token={TOKEN}", token=None)
    assert_envelope(answer, 401, "UNAUTHORIZED")


async def test_a_token_in_the_query_opens_the_stream(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path) as server:
        task_id = await server.submit(max_tokens=4)
        answer = await server.request("GET", f"/v1/tasks/{task_id}/stream?access_token={TOKEN}", token=None)
    assert answer.status == 200
    assert b"event: end" in answer.body


@pytest.mark.parametrize("value", ["", "wrong", "%ED%A0%80", "%00", "%", f"{TOKEN}&access_token=x"[:-1] + "x"])
async def test_another_token_in_the_query_does_not(tiny_model_path: Path, value: str) -> None:
    value = value.replace(TOKEN, TOKEN[:-1])
    async with serving(tiny_model_path) as server:
        answer = await server.request("GET", f"{STREAM[1]}?access_token={value}", token=None)
    assert_envelope(answer, 401, "UNAUTHORIZED")


# --- DNS rebinding ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", HOSTS_OF_THIS_MACHINE)
async def test_names_of_this_machine_are_served(tiny_model_path: Path, host: str) -> None:
    async with serving(tiny_model_path) as server:
        assert (await server.request("GET", "/health", headers={"Host": host})).status == 200


@pytest.mark.parametrize("host", FOREIGN_HOSTS)
async def test_another_host_is_forbidden_even_with_the_token(tiny_model_path: Path, host: str) -> None:
    async with serving(tiny_model_path) as server:
        for method, path in ROUTES:
            answer = await server.request(method, path, headers={"Host": host})
            assert "server.allowed_hosts" in assert_envelope(answer, 403, "FORBIDDEN")


async def test_no_host_is_forbidden(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path) as server:
        head = f"GET /health HTTP/1.0\r\nAuthorization: Bearer {TOKEN}\r\n\r\n"
        assert (await _raw(server, head)).startswith(b"HTTP/1.0 403 ")


async def test_allowed_hosts_are_served(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path, server={"allowed_hosts": ["Orchd.lan"]}) as server:
        for host, status in (("orchd.lan", 200), ("ORCHD.LAN:8737", 200), ("localhost", 200), ("evil.lan", 403)):
            assert (await server.request("GET", "/health", headers={"Host": host})).status == status


HOST_SPELLINGS = [
    ("orchd.lan:8737", ["orchd.lan", "orchd.lan:8737", "ORCHD.lan.", "orchd.lan.:443"]),
    ("Orchd.Lan.", ["orchd.lan", "orchd.lan.", "orchd.lan:1"]),
    ("fd00::1", ["[fd00::1]", "[fd00::1]:8737", "[FD00:0:0::0001]", "fd00::1"]),
    ("[fd00::1]", ["[fd00::1]", "[fd00::1]:8737", "fd00:0::1"]),
    ("[FD00:0::1]:8737", ["[fd00::1]", "[fd00::1]:1"]),
    ("192.168.1.2:8737", ["192.168.1.2", "192.168.1.2:80"]),
    ("xn--bcher-kva.lan", ["XN--BCHER-KVA.lan"]),
    ("my_box", ["my_box:8737"]),
]


@pytest.mark.parametrize(("listed", "hosts"), HOST_SPELLINGS, ids=[listed for listed, _ in HOST_SPELLINGS])
async def test_an_allowed_host_is_served_however_both_sides_spell_it(
    tiny_model_path: Path, listed: str, hosts: list[str]
) -> None:
    async with serving(tiny_model_path, server={"allowed_hosts": [listed]}) as server:
        for host in hosts:
            assert (await server.request("GET", "/health", headers={"Host": host})).status == 200, host
        for host in ("evil.lan", "[fd00::2]", "fd00::1.evil.lan", f"{listed}.evil.lan", f"{listed}@evil.lan"):
            assert (await server.request("GET", "/health", headers={"Host": host})).status == 403, host


async def test_any_host_will_do_where_the_owner_listens_to_the_network(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path, server={"host": "0.0.0.0"}) as server:
        assert (await server.request("GET", "/health", headers={"Host": "workstation.lan"})).status == 200


@pytest.mark.parametrize("host", ["localhost", "LocalHost", "127.1", "127.0.0.2"])
async def test_loopback_is_loopback_however_it_is_spelled(tiny_model_path: Path, host: str) -> None:
    async with serving(tiny_model_path, server={"host": host}) as server:
        answer = await server.request("GET", "/health", headers={"Host": "evil.com"})
    assert_envelope(answer, 403, "FORBIDDEN")


# --- CORS ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("origin", LOOPBACK_ORIGINS)
async def test_preflight_of_a_loopback_page(tiny_model_path: Path, origin: str) -> None:
    async with serving(tiny_model_path) as server:
        for _, path in ROUTES:
            answer = await server.request("OPTIONS", path, token=None, headers={"Origin": origin, **PREFLIGHT})
            assert (answer.status, answer.body) == (204, b"")
            assert answer.headers["Access-Control-Allow-Origin"] == origin
            assert answer.headers["Access-Control-Allow-Methods"] == "GET, POST"
            allowed = answer.headers["Access-Control-Allow-Headers"].lower().split(", ")
            assert {"authorization", "content-type", "last-event-id"} == set(allowed)
            assert "Origin" in answer.headers["Vary"]
            assert "Access-Control-Allow-Credentials" not in answer.headers


@pytest.mark.parametrize("origin", FOREIGN_ORIGINS)
async def test_other_pages_get_nothing(tiny_model_path: Path, origin: str) -> None:
    async with serving(tiny_model_path) as server:
        task_id = await server.submit(max_tokens=4)
        for method, path in [*ROUTES, ("GET", f"/v1/tasks/{task_id}/stream?access_token={TOKEN}")]:
            for answer in (
                await server.request("OPTIONS", path, token=None, headers={"Origin": origin, **PREFLIGHT}),
                await server.request(method, path, headers={"Origin": origin}),
            ):
                assert "server.allowed_origins" in assert_envelope(answer, 403, "FORBIDDEN")
                assert not [name for name in answer.headers if name.startswith("Access-Control-")]


async def test_every_answer_to_a_loopback_page_may_be_read_by_it(tiny_model_path: Path) -> None:
    origin = {"Origin": LOOPBACK_ORIGINS[0]}
    async with serving(tiny_model_path) as server:
        task_id = await server.submit(max_tokens=4)
        answers = [await server.request(method, path, headers=origin) for method, path in ROUTES]
        answers += [await server.request(method, path, headers=origin, token=None) for method, path in ROUTES]
        answers += [
            await server.request("GET", f"/v1/tasks/{task_id}/stream", headers=origin),
            await server.request("GET", f"/v1/tasks/{task_id}/stream", headers={**origin, "Last-Event-ID": "99"}),
            await server.request("POST", "/v1/tasks", headers=origin, prompt="the"),
            await server.request("GET", "/nowhere", headers=origin),
            await server.request("DELETE", "/health", headers=origin),
            await server.request("GET", "/health", headers={**origin, "Host": "evil.com"}),
        ]
    assert {answer.status for answer in answers} == {200, 202, 204, 400, 401, 403, 404, 405}
    for answer in answers:
        assert answer.headers["Access-Control-Allow-Origin"] == origin["Origin"]
        assert "Access-Control-Allow-Credentials" not in answer.headers
        assert {"Retry-After", "X-Backoff-Ms"} <= set(answer.headers["Access-Control-Expose-Headers"].split(", "))


async def test_without_an_origin_there_is_nothing_about_cors(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path) as server:
        for method, path in ROUTES:
            answer = await server.request(method, path)
            assert not [name for name in answer.headers if name.startswith("Access-Control-")]


async def test_allowed_origins_replace_the_loopback_ones(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path, server={"allowed_origins": ["https://Chat.lan"]}) as server:
        for origin, status in (("https://chat.lan", 200), ("http://chat.lan", 403), ("http://localhost", 403)):
            assert (await server.request("GET", "/health", headers={"Origin": origin})).status == status


ORIGIN_SPELLINGS = [
    ("tauri://localhost", ["tauri://localhost"]),
    ("app://.", ["app://."]),
    ("null", ["null"]),
    ("file://", ["file://"]),
    ("chrome-extension://abcdefghijklmnop", ["chrome-extension://abcdefghijklmnop"]),
    ("vscode-webview://1f2a-3b", ["vscode-webview://1f2a-3b"]),
    ("http://[FD00:0::1]:5173", ["http://[fd00::1]:5173"]),
    ("https://chat.lan:443", ["https://chat.lan"]),
    ("http://chat.lan:80", ["http://chat.lan"]),
    ("http://chat.lan", ["http://chat.lan:80"]),
]


@pytest.mark.parametrize(("listed", "origins"), ORIGIN_SPELLINGS, ids=[listed for listed, _ in ORIGIN_SPELLINGS])
async def test_desktop_apps_and_other_schemes_are_served_if_they_are_listed(
    tiny_model_path: Path, listed: str, origins: list[str]
) -> None:
    async with serving(tiny_model_path, server={"allowed_origins": [listed]}) as server:
        for origin in origins:
            preflight = await server.request("OPTIONS", "/health", token=None, headers={"Origin": origin, **PREFLIGHT})
            answer = await server.request("GET", "/health", headers={"Origin": origin})
            assert (preflight.status, answer.status) == (204, 200)
            assert preflight.headers["Access-Control-Allow-Origin"] == origin
            assert answer.headers["Access-Control-Allow-Origin"] == origin
            assert (await server.request("GET", "/health", token=None, headers={"Origin": origin})).status == 401
        for origin in ("http://localhost", "https://evil.com", "tauri://evil", "http://chat.lan:81", "nul", "app://"):
            assert (await server.request("GET", "/health", headers={"Origin": origin})).status == 403


async def test_an_options_that_is_no_preflight_is_a_wrong_method(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path) as server:
        assert_envelope(await server.request("OPTIONS", "/health"), 405, "METHOD_NOT_ALLOWED")
        assert_envelope(await server.request("OPTIONS", "/health", token=None), 401, "UNAUTHORIZED")


# --- the token is never written down ---------------------------------------------------------------------------------


async def test_no_log_line_holds_the_token(
    tiny_model_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    asyncio.get_running_loop().set_debug(True)
    async with serving(tiny_model_path) as server:
        task_id = await server.submit(max_tokens=4)
        stream = f"/v1/tasks/{task_id}/stream?access_token={TOKEN}"
        await server.request("GET", stream, token=None)
        await server.request("GET", f"/v1/tasks/x/stream?access_token={TOKEN}", token=None)
        await server.request("POST", stream, token=None)
        await server.request("GET", f"/nowhere?access_token={TOKEN}")
        await server.request("GET", "/health", headers={"Host": "evil.com"})
        await server.post(b"{")
        await server.post(json_of_token := f'{{"prompt":"a","{TOKEN}":1}}'.encode())
        assert TOKEN.encode() in json_of_token
        for head in (
            f"GET {stream} HTTP/9.9\r\n\r\n",
            f"GET {stream} with spaces HTTP/1.1\r\n\r\n",
            f"GET {stream}{'x' * 9000} HTTP/1.1\r\n\r\n",
            f"GET {stream} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\0\r\n\r\n",
            f"GET {stream} HTTP/1.1\r\nHost: localhost\r\nBad Header {TOKEN}: 1\r\n\r\n",
            f"GET {stream} HTTP/1.1\r\nHost: localhost\r\nExpect: {TOKEN}\r\n\r\n",
            f"{TOKEN}\r\n\r\n",
        ):
            await _raw(server, head)
        monkeypatch.setattr("orchd.service.Service.follow", lambda *_: 1 / 0)
        assert (await server.request("GET", stream, token=None)).status == 500
    assert any(record.levelno == logging.ERROR for record in caplog.records)
    assert TOKEN not in caplog.text


async def _raw(server: Running, head: str) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(head.encode())
    answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    writer.close()
    return answer
