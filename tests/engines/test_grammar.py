"""Outputs that are held to a JSON Schema, on real llama.cpp: a random model writes garbage unless it is forced."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis_jsonschema import from_schema

from engines import api
from engines.api import FinishReason, SamplingParams, Schema
from engines.errors import InvalidSchema
from engines.llamacpp import grammar as grammar_module
from engines.llamacpp import json_schema
from engines.llamacpp.grammar import Grammar, Grammars
from engines.llamacpp.model import LlamaModel
from engines.llamacpp.vocab import LlamaVocab
from testkit import tiny_gguf
from tests.engines.support import GREEDY, Output, exact, finish, loaded, run

SLOTS = 8
BATCHES = 130
"""Of `SLOTS` schemas each: 1,040 cases."""

HOT = SamplingParams(temperature=1.5, top_k=0, top_p=1.0, min_p=0.0)
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("models") / "garbage.gguf"
    return tiny_gguf.write_tiny_llama(file, eog_likely=True, bytes_likely=True, least=True)


@pytest.fixture(scope="module")
def vocab(path: Path) -> Iterator[LlamaVocab]:
    vocab = LlamaVocab(path)
    yield vocab
    vocab.close()


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[LlamaModel]:
    with loaded(exact(path, slots=SLOTS, ctx=1024)) as model:
        yield model


def asked(
    vocab: LlamaVocab,
    schema: Schema,
    *,
    key: str = "a",
    max_tokens: int = 400,
    stop: tuple[str, ...] = (),
    sampling: SamplingParams = HOT,
) -> api.Sequence:
    grammar = vocab.grammar(schema)
    return api.Sequence(key, vocab.tokenize("the river"), max_tokens, stop, sampling, grammar=grammar)


def only(model: LlamaModel, sequence: api.Sequence) -> Output:
    return run(model, sequence)[sequence.key]


NAMES = st.text('abcxyz é"\\/~0', max_size=6)
VALUES = from_schema(
    {"type": ["null", "boolean", "integer", "string"], "maxLength": 5, "minimum": -(2**53), "maximum": 2**53}
)
LEAVES: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.sampled_from([{"type": "null"}, {"type": "boolean"}, {"type": "string", "format": "date"}]),
    st.builds(lambda value: {"const": value}, VALUES),
    st.builds(lambda values: {"enum": values}, st.lists(VALUES, min_size=1, max_size=4, unique_by=json.dumps)),
    st.builds(
        lambda low, span: {"type": "integer", "minimum": low, "maximum": low + span},
        st.integers(-1000, 1000),
        st.integers(0, 500),
    ),
    st.builds(
        lambda least, more: {"type": "string", "minLength": least, "maxLength": least + more},
        st.integers(0, 4),
        st.integers(0, 4),
    ),
)


def containers(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    def of_properties(properties: dict[str, Any], required: int) -> dict[str, Any]:
        names = sorted(properties)[:required]
        return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}

    def of_items(items: dict[str, Any], least: int, more: int) -> dict[str, Any]:
        return {"type": "array", "items": items, "minItems": least, "maxItems": least + more}

    def by_name(part: dict[str, Any]) -> dict[str, Any]:
        reference = {"$ref": "#/$defs/part"}
        return {"$defs": {"part": part}, "type": "array", "prefixItems": [reference, reference], "items": False}

    return st.one_of(
        st.builds(of_properties, st.dictionaries(NAMES, inner, max_size=4), st.integers(0, 4)),
        st.builds(of_items, inner, st.integers(0, 2), st.integers(0, 2)),
        st.builds(lambda parts: {"anyOf": parts}, st.lists(inner, min_size=1, max_size=3)),
        st.builds(by_name, LEAVES),
    )


SCHEMAS = st.recursive(LEAVES, containers, max_leaves=6).filter(lambda schema: "$defs" not in json.dumps([schema])[2:])
TOP = SCHEMAS | st.builds(
    lambda part: {"$defs": {"part": part}, "type": "array", "items": {"$ref": "#/$defs/part"}, "maxItems": 3}, SCHEMAS
)


@pytest.mark.slow
@settings(max_examples=BATCHES, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
@given(schemas=st.lists(TOP, min_size=SLOTS, max_size=SLOTS), seed=st.integers(0, 2**32 - 1), greedy=st.booleans())
def test_whatever_the_schema_every_output_parses_and_is_valid(
    model: LlamaModel, vocab: LlamaVocab, schemas: list[dict[str, Any]], seed: int, greedy: bool
) -> None:
    sampling = GREEDY if greedy else replace(HOT, seed=seed)
    sequences = [
        asked(vocab, schema, key=str(number), max_tokens=900, sampling=sampling)
        for number, schema in enumerate(schemas)
    ]
    model.reset()  # after a case that failed
    outputs = run(model, *sequences)
    for number, schema in enumerate(schemas):
        output = outputs[str(number)]
        assert output.finish is FinishReason.STOP, (schema, output.text)
        jsonschema.validate(json.loads(output.text), schema)
        assert "\n" not in output.text


@pytest.mark.parametrize("seed", range(8))
def test_a_fraction_is_one_as_far_as_it_goes(model: LlamaModel, vocab: LlamaVocab, seed: int) -> None:
    schema = {"type": "number", "minimum": -3, "exclusiveMaximum": 12}
    output = only(model, asked(vocab, schema, max_tokens=200, sampling=replace(HOT, seed=seed)))
    if output.finish is FinishReason.STOP:  # a random model may write digits without end
        jsonschema.validate(json.loads(output.text), schema)


@pytest.mark.parametrize("sampling", [GREEDY, HOT, SamplingParams(), replace(HOT, repeat_penalty=1.5)])
def test_however_tokens_are_chosen(model: LlamaModel, vocab: LlamaVocab, sampling: SamplingParams) -> None:
    output = only(model, asked(vocab, PERSON, sampling=sampling))
    jsonschema.validate(json.loads(output.text), PERSON)
    assert output.finish is FinishReason.STOP


def test_true_is_any_object(model: LlamaModel, vocab: LlamaVocab) -> None:
    output = only(model, asked(vocab, True, max_tokens=900))
    assert output.text.startswith("{")
    if output.finish is FinishReason.STOP:
        assert isinstance(json.loads(output.text), dict)


def test_others_on_the_model_write_what_they_would_write_alone(model: LlamaModel, vocab: LlamaVocab) -> None:
    free = api.Sequence(
        "free", vocab.tokenize("the river"), 40, sampling=SamplingParams(temperature=0, ignore_eos=True)
    )
    alone = only(model, free).text
    outputs = run(model, free, asked(vocab, PERSON, key="held"))
    assert outputs["free"].text == alone
    jsonschema.validate(json.loads(outputs["held"].text), PERSON)


def test_max_tokens_inside_the_json_is_length(model: LlamaModel, vocab: LlamaVocab) -> None:
    output = only(model, asked(vocab, PERSON, max_tokens=3))
    assert (output.finish, output.tokens_out) == (FinishReason.LENGTH, 3)
    assert output.text.startswith("{")


def test_a_complete_text_ends_without_a_step_for_its_end(model: LlamaModel, vocab: LlamaVocab) -> None:
    output = only(model, asked(vocab, {"const": 1}))
    assert (output.text, output.finish) == ("1", FinishReason.STOP)
    assert output.events[-1].text == "1"


def test_ignore_eos_ends_where_nothing_else_is_allowed(model: LlamaModel, vocab: LlamaVocab) -> None:
    digits = {"type": "integer", "minimum": 1}
    output = only(model, asked(vocab, digits, max_tokens=30, sampling=replace(HOT, ignore_eos=True)))
    assert (output.finish, output.tokens_out) == (FinishReason.LENGTH, 30)
    assert output.text.isdigit()
    output = only(model, asked(vocab, PERSON, sampling=replace(HOT, ignore_eos=True)))
    assert output.finish is FinishReason.STOP
    jsonschema.validate(json.loads(output.text), PERSON)


def test_a_stop_string_ends_it_before(model: LlamaModel, vocab: LlamaVocab) -> None:
    output = only(model, asked(vocab, PERSON, stop=('"age',)))
    assert output.finish is FinishReason.STOP
    assert output.text.endswith(", ")


def test_the_same_seed_is_the_same_text(model: LlamaModel, vocab: LlamaVocab) -> None:
    texts = {only(model, asked(vocab, PERSON, sampling=replace(HOT, seed=seed))).text for seed in (1, 1, 2, 3)}
    assert len(texts) == 3


def test_a_cancelled_one_leaves_its_slot_to_others(model: LlamaModel, vocab: LlamaVocab) -> None:
    model.admit(asked(vocab, True))
    model.step()
    assert model.cancel("a")
    assert only(model, asked(vocab, {"const": "x"})).text == '"x"'


def test_a_grammar_serves_any_number_of_sequences(model: LlamaModel, vocab: LlamaVocab) -> None:
    first = asked(vocab, PERSON)
    outputs = run(model, first, replace(first, key="b"))
    assert outputs["a"].text == outputs["b"].text
    assert only(model, first).text == outputs["a"].text


def test_one_that_cannot_go_on_ends_alone(
    model: LlamaModel, vocab: LlamaVocab, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = grammar_module.Follower._look
    looks: list[object] = []

    def fail_later(follower: grammar_module.Follower) -> grammar_module.Allowed:
        looks.append(follower)
        if looks[0] is follower and looks.count(follower) == 4:
            raise InvalidSchema("too many items")
        return look(follower)

    monkeypatch.setattr(grammar_module.Follower, "_look", fail_later)
    outputs = run(model, asked(vocab, PERSON, key="one"), asked(vocab, PERSON, key="other")).values()
    bad, good = sorted(outputs, key=lambda output: output.finish is FinishReason.STOP)  # either may be looked at first
    assert bad.finish is FinishReason.ERROR
    assert bad.events[-1].problem == "too many items"
    jsonschema.validate(json.loads(good.text), PERSON)
    assert model.free_slots == SLOTS


# --- vocabularies ----------------------------------------------------------------------------------------------------


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


# --- what is refused -------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("pattern", ["^(a+)+$", "(a|b)*a(a|b){200}", "^(.{0,1000}){0,1000}$", "(\\w|\\d){5000}x"])
def test_a_catastrophic_pattern_costs_a_bounded_time_a_token(
    model: LlamaModel, vocab: LlamaVocab, pattern: str
) -> None:
    model.admit(asked(vocab, {"type": "string", "pattern": pattern}, max_tokens=60))
    (output,) = finish(model).values()
    assert output.finish in (FinishReason.STOP, FinishReason.LENGTH, FinishReason.ERROR)


def test_a_schema_cannot_change_how_it_is_kept_to(vocab: LlamaVocab, model: LlamaModel) -> None:
    schema = {**PERSON, "x-guidance": {"whitespace_flexible": True, "lenient": True}, "not": {}}
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
