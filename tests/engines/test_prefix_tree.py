"""The tree finds what comparing the prompt with everything, one by one, would find."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engines.llamacpp.prefix_tree import TOKEN_BYTES, PrefixTree, common_prefix, key_of

TOKENS = st.lists(st.sampled_from([0, 1, 256, 1 << 24]), max_size=10)  # bytes that recur at other places
SOME_TOKENS = TOKENS.filter(bool)


@given(TOKENS, TOKENS, TOKENS)
def test_common_prefix_equals_comparing_one_by_one(shared: list[int], a: list[int], b: list[int]) -> None:
    assert common_prefix(shared + a, shared + b) == one_by_one(shared + a, shared + b)


def one_by_one(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class TreeMachine(RuleBasedStateMachine):
    """Beside the tree, a list of everything that is in it."""

    @initialize(whole_only=st.booleans())
    def start(self, whole_only: bool) -> None:
        self.whole_only = whole_only  # not what the tree makes of it
        self.tree: PrefixTree[str] = PrefixTree(whole_only=whole_only)
        self.slots: dict[int, list[int]] = {}
        self.entries: dict[str, list[int]] = {}
        self.added = 0

    @rule(slot=st.integers(0, 3), tokens=TOKENS)
    def place(self, slot: int, tokens: list[int]) -> None:
        self.tree.place(slot, key_of(tokens))
        self.slots[slot] = tokens

    @rule(tokens=SOME_TOKENS)
    def add(self, tokens: list[int]) -> None:
        if tokens not in self.entries.values():
            self.added += 1
            self.tree.add(f"entry {self.added}", key_of(tokens))
            self.entries[f"entry {self.added}"] = tokens

    @precondition(lambda self: self.entries)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(sorted(self.entries)))
        self.tree.remove(entry)
        del self.entries[entry]

    @rule(prompt=TOKENS)
    def find(self, prompt: list[int]) -> None:
        match = self.tree.match(key_of(prompt))
        assert match.slots == {slot: one_by_one(prompt, tokens) for slot, tokens in self.slots.items()}
        shared = {entry: one_by_one(prompt, tokens) for entry, tokens in self.entries.items()}
        whole = {entry: n for entry, n in shared.items() if n == len(self.entries[entry])}
        usable = whole if self.whole_only else shared
        assert match.shared == max(usable.values(), default=0)
        assert (match.entry is None) == (match.shared == 0)
        assert match.entry is None or usable[match.entry] == match.shared
        assert sorted(self.tree.beginnings(key_of(prompt))) == sorted(whole)
        for tokens in range(4):
            nearly = [entry for entry, n in shared.items() if len(self.entries[entry]) - n < tokens]
            assert sorted(self.tree.nearly(key_of(prompt), tokens * TOKEN_BYTES)) == sorted(nearly)

    @invariant()
    def what_others_extend_is_known(self) -> None:
        for entry, tokens in self.entries.items():
            longer = any(other[: len(tokens)] == tokens for other in self.entries.values() if other is not tokens)
            assert self.tree.is_extended(entry) == longer

    @invariant()
    def nothing_is_kept_that_nobody_has(self) -> None:
        """Each node below the root is where somebody ends, or where ways part."""
        nodes = list(self.tree._root.children.values())
        for node in nodes:
            nodes += node.children.values()
            ends = [
                *(end for end in self.tree._slots.values() if end is node),
                *(end for end in self.tree._entries.values() if end is node),
            ]
            assert ends or len(node.children) > 1


TestTree = TreeMachine.TestCase
