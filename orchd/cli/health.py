"""`orchd health`, which systemd and scripts call every few seconds: without aiohttp, Rich, Typer and the schema.

Importing those takes several times as long as the answer.
"""

from __future__ import annotations

import getopt
import http.client
import json
import os
import sys
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from orchd.cli.exits import Exit, complain
from orchd.errors import Code, OrchdError
from orchd.settings.discovery import find_server

ANSWER_S: Final = 40.0
"""How long connecting, and then each silence, may take."""

MOST_BYTES: Final = 1 << 24

_FLAGS: Final = frozenset({"--json", "--strict"})
_OPTIONS: Final = frozenset({"--url", "--config", "-c", "--token-file"})
_COLOURS: Final = {"ok": "1;32", "loading": "1;33", "degraded": "1;31"}


class NoAnswer(OrchdError):
    """The server did not say how it is."""


def without_typer(arguments: list[str]) -> Exit | None:
    """Run ``health`` with these arguments if they are plain; None if Typer is needed, to explain or to correct."""
    named = {argument.partition("=")[0] for argument in arguments if argument.startswith("-")}
    if not named <= _FLAGS | _OPTIONS:
        return None
    try:
        found, rest = getopt.getopt(arguments, "c:", ["json", "strict", "url=", "config=", "token-file="])
    except getopt.GetoptError:
        return None
    given = dict(found)
    if rest:
        return None
    config, token_file = given.get("--config", given.get("-c")), given.get("--token-file")
    return health(
        given.get("--url"),
        None if config is None else Path(config),
        None if token_file is None else Path(token_file),
        strict="--strict" in given,
        as_json="--json" in given,
    )


def health(url: str | None, config: Path | None, token_file: Path | None, *, strict: bool, as_json: bool) -> Exit:
    """Ask a server how it is and print that; no answer is an answer too."""
    try:
        url, token = find_server(url=url, config_path=config, token_file=token_file)
        ready, answer = _ask(url.rstrip("/"), token)
        not_alive = _not_alive(answer)
        lines = [json.dumps(answer | {"ready": ready}, separators=(",", ":"))] if as_json else _table(answer, ready)
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    except OrchdError as error:
        complain(error)
        return Exit.NO_ANSWER
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        complain(_not_orchd(str(url), f"its answer lacks something ({type(error).__name__}: {error})"))
        return Exit.NO_ANSWER
    print("\n".join(lines))
    if ready and answer["status"] != "ok":
        complain(f"ready, but {answer['status']}{not_alive}")
    return Exit.OK if ready and (answer["status"] == "ok" or not strict) else Exit.FAILED


def _ask(url: str, token: str) -> tuple[bool, dict[str, Any]]:
    """Whether it can start tasks, and its answer. Raises `NoAnswer`."""
    status, kind, body = _get(url, token)
    try:
        answer = json.loads(body)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise NoAnswer(_not_orchd(url, f"it is another web server, which answers {status} with {kind}"))
    if answer.get("code") == Code.UNAUTHORIZED.value:
        raise NoAnswer("the server rejected this token; set the server's token with --token-file or ORCHD_TOKEN")
    if "code" in answer and "message" in answer:
        raise NoAnswer(answer["message"])
    return status == 200, answer


def _get(url: str, token: str) -> tuple[int, str, bytes]:
    """Status, media type and body."""
    try:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError
        kind = http.client.HTTPConnection if parts.scheme == "http" else http.client.HTTPSConnection
        connection = kind(parts.hostname, parts.port, timeout=ANSWER_S)
        parts.hostname.encode("idna")
    except (ValueError, http.client.HTTPException):  # a port above 65535, a label over 63 characters
        shown = url.encode("utf-8", "replace").decode()
        raise NoAnswer(f"{shown!r} is not the address of a server; use one such as http://127.0.0.1:8737") from None
    headers = {"Authorization": f"Bearer {token}", "User-Agent": "orchd-client"}
    try:
        connection.request("GET", f"{parts.path}/health", headers=headers)
        response = connection.getresponse()
        return response.status, response.headers.get_content_type(), response.read(MOST_BYTES)
    except ConnectionRefusedError:
        raise NoAnswer(f"no answer from {url} (connection refused); is `orchd serve` running there?") from None
    except OSError as error:
        if type(error).__name__ == "SSLError":
            raise NoAnswer(f"{url} does not speak HTTPS, and orchd never does; use http://") from None
        reason = "timed out" if isinstance(error, TimeoutError) else (error.strerror or str(error)).lower()
        raise NoAnswer(f"no answer from {url} ({reason}); is `orchd serve` running there?") from None
    except http.client.HTTPException as error:
        raise NoAnswer(_not_orchd(url, f"it does not speak HTTP ({type(error).__name__})")) from None
    finally:
        connection.close()


def _not_orchd(url: str, what: str) -> str:
    return f"the server at {url} does not answer like orchd: {what}"


def _not_alive(answer: dict[str, Any]) -> str:
    found = [
        f"{pool['id']}/{replica['id']} on {replica['device']}"
        for pool in answer["pools"]
        for replica in pool["replicas"]
        if not replica["alive"]
    ]
    return f": not alive: {', '.join(found)}" if found else ""


def _table(answer: dict[str, Any], ready: bool) -> list[str]:
    status = answer["status"]
    rows = [("pool", "model", "replica", "device", "state", "busy")]
    for pool in answer["pools"]:
        model = pool["model_id"] or "-"
        for replica in pool["replicas"]:
            state = ("ready" if pool["ready"] else "not ready") if replica["alive"] else "not alive"
            if pool["model_id"] is None and status == "degraded":
                state = "failed to load, see the server's log"
            busy = f"{replica['busy']}/{replica['slots']}"
            rows.append((pool["id"], model, replica["id"], replica["device"], state, busy))
        if not pool["replicas"]:
            rows.append((pool["id"], model, "-", "-", "not ready", "0/0"))
    shown = [[_printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in shown]
    for row, cells in zip(rows[1:], lines[1:], strict=True):
        cells[4] = _painted(cells[4], "32" if row[4] == "ready" else "31")
    head = _painted("  ".join(lines[0]).rstrip(), "1")
    return [_painted(status, _COLOURS[status]), head, *("  ".join(cells).rstrip() for cells in lines[1:])]


def _painted(text: str, colour: str) -> str:
    """In colour on a terminal that can show it, unless `NO_COLOR` is set."""
    plain = not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") in (None, "", "dumb")
    return text if plain else f"\x1b[{colour}m{text}\x1b[0m"


def _printable(text: str) -> str:
    """What a server says must not drive the terminal."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
