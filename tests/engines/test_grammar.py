"""Outputs that are held to a JSON Schema, on real llama.cpp: a random model writes garbage unless it is forced."""

from __future__ import annotations

import json
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
from engines.llamacpp.model import LlamaModel
from engines.llamacpp.vocab import LlamaVocab
from testkit import tiny_gguf
from tests.engines.support import GREEDY, Output, exact, finish, loaded, run

SLOTS = 8
BATCHES = 130
"""Of `SLOTS` schemas each: 1,040 cases."""
LONGEST = 900
"""Bytes of a text, and so tokens: the longest that any of these schemas allows."""

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


def longest(schema: dict[str, Any], part: int = 0) -> int:
    """At least as many bytes as any text that is valid for it has; ``part`` is that for what a reference names."""
    match schema:
        case {"$defs": {"part": inner}, **rest}:
            return longest(rest, longest(inner))
        case {"$ref": _}:
            return part
        case {"anyOf": alternatives}:
            return max(longest(one, part) for one in alternatives)
        case {"enum": values}:
            return max(len(json.dumps(value)) for value in values)
        case {"const": value}:
            return len(json.dumps(value))
        case {"prefixItems": items}:
            return 2 + sum(2 + longest(one, part) for one in items)
        case {"type": "array", "items": items, "maxItems": most}:
            return 2 + int(most) * (2 + longest(items, part))
        case {"type": "object", "properties": properties}:
            return 2 + sum(len(json.dumps(name)) + 4 + longest(one, part) for name, one in properties.items())
        case {"type": "string", "maxLength": most}:
            return 2 + int(most) * len(r"\ud83d\ude00")
        case _:
            return len('"2000-01-01"')


SCHEMAS = st.recursive(LEAVES, containers, max_leaves=6).filter(lambda schema: "$defs" not in json.dumps([schema])[2:])
TOP = SCHEMAS | st.builds(
    lambda part: {"$defs": {"part": part}, "type": "array", "items": {"$ref": "#/$defs/part"}, "maxItems": 3}, SCHEMAS
)


FITTING = TOP.filter(lambda schema: longest(schema) <= LONGEST)


@pytest.mark.slow
@settings(max_examples=BATCHES, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
@given(schemas=st.lists(FITTING, min_size=SLOTS, max_size=SLOTS), seed=st.integers(0, 2**32 - 1), greedy=st.booleans())
def test_whatever_the_schema_every_output_parses_and_is_valid(
    model: LlamaModel, vocab: LlamaVocab, schemas: list[dict[str, Any]], seed: int, greedy: bool
) -> None:
    sampling = GREEDY if greedy else replace(HOT, seed=seed)
    sequences = [
        asked(vocab, schema, key=str(number), max_tokens=LONGEST, sampling=sampling)
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


@pytest.mark.parametrize("pattern", ["^(a+)+$", "(a|b)*a(a|b){200}", "^(.{0,1000}){0,1000}$", "(\\w|\\d){5000}x"])
def test_a_catastrophic_pattern_costs_a_bounded_time_a_token(
    model: LlamaModel, vocab: LlamaVocab, pattern: str
) -> None:
    model.admit(asked(vocab, {"type": "string", "pattern": pattern}, max_tokens=60))
    (output,) = finish(model).values()
    assert output.finish in (FinishReason.STOP, FinishReason.LENGTH, FinishReason.ERROR)
