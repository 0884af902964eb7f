"""Compiling a JSON Schema for a vocabulary: what it allows, and what is refused in time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from engines.errors import InvalidSchema
from engines.llamacpp import grammar as grammar_module
from engines.llamacpp import json_schema
from engines.llamacpp.grammar import Grammar, Grammars
from engines.llamacpp.vocab import LlamaVocab
from testkit import tiny_gguf


@pytest.fixture(scope="module")
def vocab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaVocab]:
    vocab = LlamaVocab(tiny_gguf.write_tiny_llama(tmp_path_factory.mktemp("models") / "m.gguf"))
    yield vocab
    vocab.close()


def bytewise(*more: bytes | None) -> list[bytes | None]:
    return [*(bytes([byte]) for byte in range(256)), *more]


def test_the_vocabulary_is_read_once_and_not_before_it_is_needed() -> None:
    reads = []

    def pieces() -> list[bytes | None]:
        reads.append(1)
        return bytewise(None)

    grammars = Grammars("m", pieces, [256])
    assert reads == []
    threads = [threading.Thread(target=grammars.compile, args=(True,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert reads == [1]


def allowed(grammar: Grammar, text: bytes) -> set[int]:
    matcher = grammar.begin()
    for byte in text:
        matcher.take(byte)
    mask = matcher.mask()
    return {token for token in range(32 * len(mask)) if mask[token // 32] >> (token % 32) & 1}


def test_control_tokens_are_never_allowed_but_for_the_ends_at_the_end() -> None:
    grammar = Grammars("m", lambda: bytewise(None, b"", None, b"12", b"<think>"), [256, 258]).compile(
        {"type": "integer"}
    )
    assert allowed(grammar, b"") == {ord("-"), *b"0123456789", 259}
    assert allowed(grammar, b"1") == {*b"0123456789", 256, 258, 259}
    grammar = Grammars("m", lambda: bytewise(None, b"", None, b"12", b"<think>"), [256, 258]).compile(
        {"type": "string"}
    )
    assert {256, 257, 258} & allowed(grammar, b'"') == set()
    assert 260 in allowed(grammar, b'"')  # it is text here


def test_a_vocabulary_that_cannot_spell_json_is_refused() -> None:
    pieces = [piece for piece in bytewise(None) if piece != b"{"]
    with pytest.raises(InvalidSchema, match=r"^m cannot write JSON: its vocabulary has no token for '{'$"):
        Grammars("m", lambda: pieces, [255]).compile(True)
    with pytest.raises(InvalidSchema, match="no token that ends a text"):
        Grammars("m", lambda: bytewise(), []).compile(True)


def chain(length: int, kind: str) -> dict[str, Any]:
    links = {f"d{number}": {kind: [{"$ref": f"#/$defs/d{number + 1}"}]} for number in range(length)}
    return {"$ref": "#/$defs/d0", "$defs": {**links, f"d{length}": {"type": "string"}}}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "not supported": (
        {"properties": {"a/b": {"type": "array", "items": {"type": "array", "uniqueItems": True}}}},
        r'^#/properties/a~1b/items: not supported: \["uniqueItems"\]$',
    ),
    "a loop of references": ({"$ref": "#"}, "no JSON is valid for it"),
    "another loop": ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "no JSON is valid for it"),
    "nothing": ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "Unsatisfiable"),
    "another file": ({"$ref": "http://127.0.0.1/a"}, "not present"),
    "no regular expression": (
        {"properties": {"a": {"type": "string", "pattern": "("}}},
        "^#/properties/a: regex parse",
    ),
    "look-ahead": ({"type": "string", "pattern": "(?=a)b"}, "look-ahead"),
    "an unknown type": ({"type": "text"}, "Invalid type: text"),
    "too deep": (nested(60), "^#: over 50 objects and arrays"),
    "a long enumeration": ({"enum": [f"v{number}" for number in range(40_000)]}, "more than 65536 bytes"),
    "a long integer": ({"enum": [1, 2**53 + 1]}, "the integer 9007199254740993 would be rounded"),
    "a long text": ({"const": "x" * 70_000}, "more than 65536 bytes"),
    "many alternatives": ({"oneOf": [{"const": number} for number in range(40_000)]}, "more than 65536 bytes"),
    "patterns that multiply": (
        {"allOf": [{"type": "string", "pattern": f"(a|b)*a(a|b){{{number}}}"} for number in range(1, 14)]},
        "too much time or memory",
    ),
    "many patterns": (
        {"allOf": [{"type": "string", "pattern": f"a{number}"} for number in range(1200)]},
        "too much time or memory",
    ),
    "a long chain of references": (chain(1000, "anyOf"), "too much time or memory"),
    "another long chain": (chain(1000, "allOf"), "too much time or memory"),
}


@pytest.mark.parametrize(("schema", "message"), REFUSED.values(), ids=REFUSED)
def test_a_schema_that_cannot_be_kept_to_is_refused_in_time(
    vocab: LlamaVocab, schema: dict[str, Any], message: str
) -> None:
    began = time.thread_time()
    with pytest.raises(InvalidSchema, match=message):
        vocab.grammar(schema)
    assert time.thread_time() - began < 1


def test_a_schema_cannot_change_how_it_is_kept_to(vocab: LlamaVocab) -> None:
    schema = {"type": "object", "x-guidance": {"whitespace_flexible": True, "lenient": True}, "not": {}}
    with pytest.raises(InvalidSchema, match="not supported"):
        vocab.grammar(schema)


def test_a_compilation_that_hangs_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    real, goes_on = json_schema.compiled, threading.Event()
    grammars = Grammars("m", lambda: bytewise(None), [256])
    grammars.compile(True)

    def hang(*arguments: Any) -> Any:
        assert goes_on.wait(60)
        return real(*arguments)

    monkeypatch.setattr(grammar_module, "TIME_LIMIT_S", 0.05)
    monkeypatch.setattr(grammar_module, "compiled", hang)
    for _ in range(grammar_module.MOST_LEFT_BEHIND):
        with pytest.raises(InvalidSchema, match="takes too much time or memory"):
            grammars.compile(True)
    monkeypatch.setattr(grammar_module, "compiled", real)
    with pytest.raises(InvalidSchema, match="earlier ones still are"):
        grammars.compile(True)
    left = [thread for thread in threading.enumerate() if thread.name == "schema"]
    assert left
    assert all(thread.daemon for thread in left)  # or the process would not end
    goes_on.set()
    for thread in left:
        thread.join(60)
    monkeypatch.setattr(grammar_module, "TIME_LIMIT_S", 60)
    grammars.compile(True)


def test_others_are_compiled_while_one_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    real, goes_on, hung = json_schema.compiled, threading.Event(), threading.Event()
    grammars = Grammars("m", lambda: bytewise(None), [256])

    def hang(schema: dict[str, Any], *arguments: Any) -> Any:
        if schema == {"const": "hang"}:
            hung.set()
            assert goes_on.wait(60)
        return real(schema, *arguments)

    monkeypatch.setattr(grammar_module, "compiled", hang)
    thread = threading.Thread(target=grammars.compile, args=({"const": "hang"},))
    thread.start()
    assert hung.wait(60)
    grammars.compile(True)
    goes_on.set()
    thread.join(60)
    assert not thread.is_alive()
