"""A TCP relay that can cut a connection in the middle of what the server sends."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator


class CuttingProxy:
    """Relays to a port of this machine, and cuts the connection of the first request that contains `where`.

    Args:
        target_port: Where to.
        where: Text of the request to cut, such as ``/stream``.
        after_bytes: How much of the answer gets through.
    """

    def __init__(self, target_port: int, *, where: str, after_bytes: int) -> None:
        self._target_port = target_port
        self._where = where.encode()
        self._after_bytes = after_bytes
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self._to_cut: list[socket.socket] = []
        self.port: int = self._listening.getsockname()[1]
        self.cuts = 0
        self.requests: list[bytes] = []
        """The head of each request to cut, as it arrived."""

    def run(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listening.accept()
                server = socket.create_connection(("127.0.0.1", self._target_port))
                self._open += [client, server]
                threading.Thread(target=self._relay, args=(client, server), daemon=True).start()

    def _relay(self, client: socket.socket, server: socket.socket) -> None:
        threading.Thread(target=self._pump, args=(client, server), daemon=True).start()
        with contextlib.suppress(OSError):
            left = self._after_bytes
            while data := server.recv(256):
                cut = server in self._to_cut
                client.sendall(data[:left] if cut else data)
                left -= len(data) if cut else 0
                if cut and left <= 0:
                    self._to_cut.remove(server)
                    self.cuts += 1
                    break
        self._hang_up(client, server)

    def _pump(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(65536):  # a browser sends its requests whole
                if self._where in data:
                    if not self.requests:
                        self._to_cut.append(server)
                    self.requests.append(data)
                server.sendall(data)
        self._hang_up(client, server)

    def _hang_up(self, *sockets: socket.socket) -> None:
        for each in sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._hang_up(*self._open)
        for each in self._open:
            each.close()


@contextlib.contextmanager
def cutting(target_port: int, *, where: str, after_bytes: int) -> Iterator[CuttingProxy]:
    proxy = CuttingProxy(target_port, where=where, after_bytes=after_bytes)
    thread = threading.Thread(target=proxy.run)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.close()
        thread.join()
