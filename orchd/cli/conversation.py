"""A conversation as its client keeps it: the server sees all of it anew with each turn. No terminal, no server."""

from __future__ import annotations

from orchd.schemas import Message


class Conversation:
    """Turns, in order; at its end there may be a message without an answer.

    Args:
        system: Put before the first message; None for nothing.
    """

    def __init__(self, system: str | None = None) -> None:
        self.system = system
        self._turns: list[Message] = []

    @property
    def messages(self) -> list[Message]:
        """What the server is sent."""
        before = [] if self.system is None else [Message(role="system", content=self.system)]
        return before + self._turns

    def say(self, text: str) -> None:
        """A message; one that got no answer gives way to it."""
        self._forget("user")
        self._turns.append(Message(role="user", content=text))

    def answer(self, text: str) -> None:
        """What the model wrote, whole or not; nothing is no answer."""
        if text:
            self._turns.append(Message(role="assistant", content=text))

    def retry(self) -> bool:
        """Make the last message one without an answer; False if there is none."""
        self._forget("assistant")
        return bool(self._turns)

    def clear(self) -> None:
        """Begin anew, with the same system message."""
        self._turns.clear()

    def _forget(self, role: str) -> None:
        if self._turns and self._turns[-1].role == role:
            self._turns.pop()
