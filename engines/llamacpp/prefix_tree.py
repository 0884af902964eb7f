"""Who knows the longest beginning of a prompt: a radix tree of token sequences.

Slots are in it, few and each with one sequence, and the entries of the prompt cache, many. With the entries ``A B C``
and ``A B D E`` and a slot with ``A B D``, the tree has the edges ``A B``, below it ``C`` and ``D``, and below that
``E``. The prompt ``A B D F`` follows them to ``D``: three tokens are known in the slot and in the second entry.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterator, Sequence
from typing import Generic, NamedTuple, TypeVar

Entry = TypeVar("Entry", bound=Hashable)

Key = bytes
"""A token sequence as it is compared: as the bytes of 32-bit numbers."""

TOKEN_BYTES = array("i").itemsize


class Match(NamedTuple, Generic[Entry]):
    """What is known of a prompt.

    Attributes:
        slots: By slot, how many leading tokens its sequence shares; all slots that have one.
        entry: The entry that shares most; None if none shares a token that is of use.
        shared: Leading tokens of that entry.
    """

    slots: dict[int, int]
    entry: Entry | None
    shared: int


class _Node(Generic[Entry]):
    """The end of an edge.

    Attributes:
        label: Of the edge from the parent.
        end: Length of all labels from the root, in bytes.
        slots: Whose sequences go through it or end here.
        n_entries: How many entries do.
        entry: The one that ends here.
    """

    __slots__ = ("children", "end", "entry", "label", "n_entries", "parent", "slots")

    def __init__(self, label: Key, parent: _Node[Entry] | None) -> None:
        self.label = label
        self.parent = parent
        self.end: int = len(label) + (parent.end if parent is not None else 0)
        self.children: dict[Key, _Node[Entry]] = {}
        self.slots: set[int] = set()
        self.n_entries = 0
        self.entry: Entry | None = None


class PrefixTree(Generic[Entry]):
    """Slots and entries by their tokens.

    Args:
        whole_only: Whether an entry serves only prompts that begin with all of it.
    """

    def __init__(self, *, whole_only: bool = False) -> None:
        self.whole_only = whole_only
        self._root: _Node[Entry] = _Node(b"", None)
        self._slots: dict[int, _Node[Entry]] = {}  # where each one's sequence ends
        self._entries: dict[Entry, _Node[Entry]] = {}

    def match(self, key: Key) -> Match[Entry]:
        """Who shares how much of a prompt."""
        path, shared = self._path(key)
        slots: dict[int, int] = {}
        best: tuple[Entry, int] | None = None
        for node in reversed(path):
            if len(node.slots) > len(slots):  # a node has all that those below it have
                slots |= dict.fromkeys(node.slots - slots.keys(), shared // TOKEN_BYTES)
            if best is None and node.n_entries and shared:
                entry = self._ends_with(node, shared) if self.whole_only else self._any_entry(node)
                best = None if entry is None else (entry, shared // TOKEN_BYTES)
            if node.parent is not None:
                shared = node.parent.end
        return Match(slots, *(best or (None, 0)))

    def place(self, slot: int, key: Key) -> None:
        """A slot has this sequence now, in place of another."""
        if (before := self._slots.get(slot)) is not None:
            for node in _up(before):
                node.slots.remove(slot)
            self._tidy(before)
        self._slots[slot] = end = self._reach(key)
        for node in _up(end):
            node.slots.add(slot)

    def add(self, entry: Entry, key: Key) -> None:
        """Add an entry; none may have the same tokens."""
        self._entries[entry] = end = self._reach(key)
        assert end.entry is None
        end.entry = entry
        for node in _up(end):
            node.n_entries += 1

    def remove(self, entry: Entry) -> None:
        """Remove an entry."""
        end = self._entries.pop(entry)
        end.entry = None
        for node in _up(end):
            node.n_entries -= 1
        self._tidy(end)

    def beginnings(self, key: Key) -> list[Entry]:
        """The entries that a sequence begins with."""
        path, shared = self._path(key)
        found = [*(node.entry for node in path[:-1]), self._ends_with(path[-1], shared)]
        return [entry for entry in found if entry is not None]

    def nearly(self, key: Key, n_bytes: int) -> list[Entry]:
        """The entries that a sequence shares but for fewer than so many bytes at their end."""
        path, shared = self._path(key)
        found: list[Entry] = []
        for index, node in enumerate(path):
            fork, on_path = (shared, None) if node is path[-1] else (node.end, path[index + 1])
            near = [node]
            while near:
                below = near.pop()
                if below.end - fork >= n_bytes:
                    continue
                if below.entry is not None:
                    found.append(below.entry)
                near += (child for child in below.children.values() if child is not on_path and child.n_entries)
        return found

    def is_extended(self, entry: Entry) -> bool:
        """Whether another entry begins with this one."""
        return self._entries[entry].n_entries > 1

    def _path(self, key: Key) -> tuple[list[_Node[Entry]], int]:
        """The nodes that a sequence leads to, and how many bytes it shares with the last; with the others, all."""
        node, shared = self._root, 0
        path = [node]
        while (child := node.children.get(key[shared : shared + TOKEN_BYTES])) is not None:
            node = child
            path.append(node)
            if not key.startswith(node.label, shared):
                part = common_prefix(node.label, key[shared : shared + len(node.label)])
                return path, shared + part - part % TOKEN_BYTES
            shared = node.end
        return path, shared

    def _reach(self, key: Key) -> _Node[Entry]:
        """The node at which a sequence ends, which is made if there is none."""
        path, shared = self._path(key)
        node = path[-1]
        if shared < node.end:
            node = self._split(node, shared)
        if shared < len(key):
            child: _Node[Entry] = _Node(key[shared:], node)
            node.children[child.label[:TOKEN_BYTES]] = child
            node = child
        return node

    def _split(self, lower: _Node[Entry], at: int) -> _Node[Entry]:
        """Make a node in the middle of an edge; whoever ends at the edge's end still does."""
        parent = lower.parent
        assert parent is not None  # the root has no edge
        upper: _Node[Entry] = _Node(lower.label[: at - parent.end], parent)
        upper.slots, upper.n_entries = set(lower.slots), lower.n_entries
        parent.children[upper.label[:TOKEN_BYTES]] = upper
        _hang(lower, upper, lower.label[len(upper.label) :])
        return upper

    def _tidy(self, node: _Node[Entry]) -> None:
        """Remove what nobody has any more from here upwards, and nodes at which nobody ends and no ways part."""
        while (parent := node.parent) is not None:
            if not node.slots and not node.n_entries:
                del parent.children[node.label[:TOKEN_BYTES]]
            elif len(node.children) == 1:
                (child,) = node.children.values()
                if child.n_entries == node.n_entries and len(child.slots) == len(node.slots):
                    _hang(child, parent, node.label + child.label)
            node = parent

    def _ends_with(self, node: _Node[Entry], shared: int) -> Entry | None:
        return node.entry if shared == node.end else None

    def _any_entry(self, node: _Node[Entry]) -> Entry:
        while node.entry is None:
            node = next(child for child in node.children.values() if child.n_entries)
        return node.entry


def key_of(tokens: Sequence[int]) -> Key:
    """Tokens as a tree compares them."""
    return array("i", tokens).tobytes()


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix; slices are compared at C speed, halving the unknown part each time."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _hang(node: _Node[Entry], parent: _Node[Entry], label: Key) -> None:
    node.label, node.parent = label, parent
    parent.children[label[:TOKEN_BYTES]] = node


def _up(node: _Node[Entry] | None) -> Iterator[_Node[Entry]]:
    """A node and all above it."""
    while node is not None:
        yield node
        node = node.parent
