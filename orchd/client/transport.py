"""One HTTP exchange with an orchd server: send, read, and turn what went wrong into a `ClientError`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from typing import Final, NamedTuple, TypeVar

import aiohttp
import msgspec
from yarl import URL

from orchd.client.errors import BY_STATUS, BadAnswer, ClientError, NotReachable, Refused
from orchd.schemas import ErrorBody

DEFAULT_URL: Final = "http://127.0.0.1:8737"

LOST: Final = (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, asyncio.TimeoutError)
"""What aiohttp raises when a connection cannot be made, breaks, or falls silent."""

_RESEND_PAUSES_S: Final = (0.05, 0.1, 0.2)

_T = TypeVar("_T")


class Reply(NamedTuple):
    """An HTTP answer that was read to its end."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Transport:
    """A base URL, a token and a connection pool. The token is sent as a header and is in no message."""

    def __init__(self, base_url: str, *, token: str, connect_timeout_s: float, answer_timeout_s: float) -> None:
        if not _is_address(base_url):
            raise ValueError(f"{base_url!r} is not the address of a server; use one such as {DEFAULT_URL}")
        if not token or not token.isascii() or not token.isprintable() or " " in token:
            raise ValueError("the token must be printable ASCII without spaces")
        self.base_url = base_url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {token}", "User-Agent": "orchd-client"}
        self._connect_timeout_s = connect_timeout_s
        self._answer_timeout_s = answer_timeout_s
        self._session: aiohttp.ClientSession | None = None

    def open(self) -> None:
        """Begin; on the event loop that will use it."""
        connector = aiohttp.TCPConnector(limit=0)  # each stream keeps a connection; with a limit all else waits for one
        self._session = aiohttp.ClientSession(headers=self._headers, connector=connector)

    async def close(self) -> None:
        """Close every connection."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def exchange(
        self,
        method: str,
        path: str,
        *,
        body: bytes | None = None,
        repeatable: bool = True,
        patient: bool = False,
    ) -> Reply:
        """Sends a request and reads its answer whole.

        Args:
            method: Such as ``POST``.
            path: Below the base URL, percent-encoded.
            body: JSON.
            repeatable: Whether the request may be sent again if the connection breaks before the answer.
            patient: Whether the answer may take any time.

        Raises:
            NotReachable: No answer.
            BadAnswer: No HTTP answer.
        """
        headers = {} if body is None else {"Content-Type": "application/json"}
        timeout = self._timeout(None) if patient else self._timeout(self._answer_timeout_s, whole=True)
        pauses_s = iter(_RESEND_PAUSES_S if repeatable else ())
        while True:
            try:
                response = await self.send(method, path, body=body, headers=headers, timeout=timeout)
                async with response:
                    return await read(response)
            except LOST as error:
                pause_s = None if isinstance(error, _NOT_WORTH_REPEATING) else next(pauses_s, None)
                if pause_s is None:
                    raise self._not_reachable(error) from error
            await asyncio.sleep(pause_s)

    async def send(
        self,
        method: str,
        path: str,
        *,
        body: bytes | None = None,
        headers: Mapping[str, str],
        timeout: aiohttp.ClientTimeout | None = None,
    ) -> aiohttp.ClientResponse:
        """Sends a request; the answer's body is still to be read. Raises `LOST` as it comes.

        The body may take any time but must not fall silent, unless there is another timeout.
        """
        if self._session is None:
            raise RuntimeError("the client is not open; use it as `async with Client(...) as client:`")
        try:
            return await self._session.request(
                method,
                URL(self.base_url + path, encoded=True),
                data=body,
                headers=headers,
                timeout=timeout or self._timeout(self._answer_timeout_s),
                allow_redirects=False,  # the token goes to this server and nowhere else
            )
        except aiohttp.ClientResponseError as error:
            # Without its cause: the repr of that one holds the request's headers, and so the token.
            raise self.bad_answer(f"it does not speak HTTP ({error.message})") from None

    def _timeout(self, silence_s: float | None, *, whole: bool = False) -> aiohttp.ClientTimeout:
        """Limits for a connection, its name looked up, and for silence; or for the whole exchange."""
        total_s = self._connect_timeout_s + self._answer_timeout_s if whole else None
        return aiohttp.ClientTimeout(total=total_s, connect=self._connect_timeout_s, sock_read=silence_s)

    def decode(self, reply: Reply, kind: type[_T]) -> _T:
        """The body as one of our structs. Raises `BadAnswer`."""
        try:
            return msgspec.json.decode(reply.body, type=kind)
        except msgspec.DecodeError as error:
            raise self.bad_answer(str(error)) from error

    def refusal(self, reply: Reply) -> ClientError:
        """The error that an answer stands for: `Refused`, or `BadAnswer` if it holds no error envelope."""
        try:
            envelope = msgspec.json.decode(reply.body, type=ErrorBody)
        except msgspec.DecodeError:
            kind = reply.headers.get("Content-Type", "no content").partition(";")[0]
            return self.bad_answer(f"it is another web server, which answers {reply.status} with {kind}")
        return BY_STATUS.get(reply.status, Refused)(
            status=reply.status,
            code=envelope.code,
            message=envelope.message,
            retry_after_s=_number(reply.headers.get("Retry-After")),
            backoff_ms=_number(reply.headers.get("X-Backoff-Ms")),
        )

    def bad_answer(self, what: str) -> BadAnswer:
        """The error for an answer that no orchd server gives."""
        return BadAnswer(f"the server at {self.base_url} does not answer like orchd: {what}")

    def _not_reachable(self, error: BaseException) -> NotReachable:
        hint = "; is `orchd serve` running there?" if isinstance(error, aiohttp.ClientConnectorError) else ""
        if isinstance(error, aiohttp.ClientSSLError):
            return NotReachable(f"{self.base_url} does not speak HTTPS, and orchd never does; use http://")
        return NotReachable(f"no answer from {self.base_url} ({reason(error)}){hint}")


_NOT_WORTH_REPEATING: Final = (aiohttp.ClientConnectorError, asyncio.TimeoutError)
"""Nobody listens, or the time is over already."""


def _is_address(url: str) -> bool:
    try:
        host = URL(url).host
        return url.startswith(("http://", "https://")) and host is not None and bool(host.encode("idna"))
    except ValueError:  # a port above 65535, a label over 63 characters
        return False


async def read(response: aiohttp.ClientResponse) -> Reply:
    """All of an answer."""
    return Reply(response.status, response.headers, await response.read())


def reason(error: BaseException) -> str:
    """An error of `LOST` in a few words."""
    if isinstance(error, aiohttp.ClientConnectorError) and error.errno is not None and error.errno > 0:
        return os.strerror(error.errno).lower()
    if isinstance(error, aiohttp.ClientConnectorError):
        return error.strerror or str(error)
    if isinstance(error, asyncio.TimeoutError):
        return "timed out"
    return str(error) or type(error).__name__


def _number(header: str | None) -> float | None:
    """A header's number of seconds or milliseconds; None for anything else, such as an HTTP date."""
    try:
        number = float(header or "")
    except ValueError:
        return None
    return number if 0 <= number < float("inf") else None
