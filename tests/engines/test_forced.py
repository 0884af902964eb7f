"""What a schema leaves no choice about: which tokens, and how they are spelled."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engines.errors import InvalidSchema
from engines.llamacpp.grammar import MOST_FORCED, SPELLED_CHARS, Follower, Grammars
from engines.llamacpp.vocab import LlamaVocab
from testkit.tiny_tokenizers import CONTROL, USER_DEFINED, write_bpe, write_sentencepiece

ALL = 1 << 30
WORDS = ("▁", "▁r", "iv", "▁riv", "er", "▁river", '":', "▁a", "am", "▁n", "▁nam")
TEXT = 'sehr groß, 日本語 <s> <think> 🙂\n\\"'
SCHEMA = {
    "type": "object",
    "properties": {
        "first name": {"type": "string"},
        "Größe": {"const": TEXT},
        "either": {"enum": ["éa", "èa", "river trout", "river otter"]},
        "numbers": {"type": "array", "items": {"const": 1234567}, "minItems": 3, "maxItems": 3},
    },
    "required": ["first name", "Größe", "either", "numbers"],
    "additionalProperties": False,
}
WRITTEN = {"first name": "Otter", "Größe": TEXT, "either": "river trout", "numbers": [1234567] * 3}


@pytest.fixture(scope="module")
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as threads:
        yield threads


@pytest.fixture(params=["smollm2", "BPE", "SentencePiece", "SentencePiece without a space in front"])
def vocab(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LlamaVocab]:
    if request.param == "smollm2":
        path = request.getfixturevalue("smollm2_path")
    elif request.param == "BPE":
        more = {"<think>": USER_DEFINED, "<|end|>": CONTROL}
        path = write_bpe(tmp_path / "bpe.gguf", more=more, words=('":', 'Ġ"', "ri", "ve", "rive", "12", "34", "1234"))
    else:
        spaced = request.param == "SentencePiece"
        path = write_sentencepiece(tmp_path / "spm.gguf", words=WORDS, add_space_prefix=spaced)
    vocab = LlamaVocab(path)
    yield vocab
    vocab.close()


def follow(vocab: LlamaVocab, schema: dict[str, object], threads: ThreadPoolExecutor, *, most: int = ALL) -> Follower:
    return Follower(vocab.grammar(schema), threads, ends=vocab._grammars._ends, most=most)


def pieces_of(vocab: LlamaVocab) -> Sequence[bytes]:
    return [piece or b"" for piece in vocab._all_pieces()]


def allowed_ids(follower: Follower) -> set[int]:
    few = follower.allowed().few
    assert few is not None
    return set(few.tolist())


def write(vocab: LlamaVocab, follower: Follower, value: object) -> tuple[list[int], int]:
    """Write a value as the model's tokenizer would where there is a choice; returns its tokens, and how many forced."""
    pieces = pieces_of(vocab)
    text = json.dumps(value, ensure_ascii=False)
    own = vocab._tokenizer.spell(text)
    at = dict(zip(itertools.accumulate((len(pieces[token]) for token in own), initial=0), own, strict=False))
    tokens: list[int] = []
    count, complete = 0, False
    while not complete:
        new = list(follower.forced())
        if new:
            assert allowed_ids(follower) == {new[0]}
            count += len(new)
        else:
            new = [at[sum(len(pieces[token]) for token in tokens)]]
            assert new[0] in allowed_ids(follower)
        tokens += new
        complete = follower.take(*new)
    assert b"".join(pieces[token] for token in tokens) == text.encode()
    return tokens, count


def test_what_is_forced_is_spelled_as_the_model_would(vocab: LlamaVocab, threads: ThreadPoolExecutor) -> None:
    tokens, forced = write(vocab, follow(vocab, SCHEMA, threads), WRITTEN)
    assert tokens == vocab._tokenizer.spell(json.dumps(WRITTEN, ensure_ascii=False))
    assert forced > len(tokens) / 2


def test_forced_leaves_the_state_as_it_is(vocab: LlamaVocab, threads: ThreadPoolExecutor) -> None:
    follower = follow(vocab, SCHEMA, threads)
    before = list(follower.forced())
    assert before == list(follower.forced()) != []
    follower.take(before[0])
    assert list(follower.forced()) == before[1:]


def test_nothing_is_forced_where_there_is_a_choice(vocab: LlamaVocab, threads: ThreadPoolExecutor) -> None:
    assert list(follow(vocab, {"type": "integer"}, threads).forced()) == []
    assert list(follow(vocab, {"enum": [12, 34]}, threads).forced()) == []


def test_where_two_values_go_apart_no_longer_token_is_ruled_out(vocab: LlamaVocab, threads: ThreadPoolExecutor) -> None:
    follower = follow(vocab, {"enum": ["a river", "a rivulet"]}, threads)
    forced = follower.forced()
    pieces = pieces_of(vocab)
    before = b"".join(pieces[token] for token in forced)
    follower.take(*forced)
    after = {before + pieces[token] for token in allowed_ids(follower)}
    assert all(b'"a river"'.startswith(text) or b'"a rivulet"'.startswith(text) for text in after)
    for word in (b'"a river"', b'"a rivulet"'):
        fitting = {before + piece for piece in pieces if piece and word.startswith(before + piece)}
        assert fitting <= after


def test_a_long_constant_is_forced_part_by_part(vocab: LlamaVocab, threads: ThreadPoolExecutor) -> None:
    text = "the river 1234 日本語 " * (3 * SPELLED_CHARS // 19)
    follower = follow(vocab, {"const": text}, threads)
    assert len(follower.forced()) == MOST_FORCED
    tokens, forced = write(vocab, follower, text)
    assert len(tokens) == forced


def test_a_vocabulary_that_is_closed_goes_on_with_the_longest_tokens(
    vocab: LlamaVocab, threads: ThreadPoolExecutor
) -> None:
    follower = follow(vocab, {"const": "sehr groß, 日本語 <s> river"}, threads)
    pieces = pieces_of(vocab)
    follower.take(first := follower.forced()[0])
    vocab.close()  # a reload: what runs may finish
    text, complete = pieces[first], False
    while not complete:
        token = follower.forced()[0]
        text += pieces[token]
        complete = follower.take(token)
    assert text.decode() == '"sehr groß, 日本語 <s> river"'


def test_a_tokenizer_that_adds_a_space_does_not_add_one_here(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    path = write_sentencepiece(tmp_path / "spm.gguf", more={"<think>": USER_DEFINED}, words=WORDS)
    vocab = LlamaVocab(path)
    assert b"".join(pieces_of(vocab)[token] for token in vocab._tokenizer.spell("a<think> river")) != b"a<think> river"
    tokens, forced = write(vocab, follow(vocab, {"const": "a<think> river"}, threads), "a<think> river")
    assert len(tokens) == forced
    vocab.close()


@pytest.mark.parametrize("count", [257, 300, 319])
def test_a_vocabulary_of_any_size_has_no_more_tokens_than_it_has(threads: ThreadPoolExecutor, count: int) -> None:
    pieces = [*(bytes([byte]) for byte in range(256)), *[None] * (count - 256)]
    grammars = Grammars("m", lambda: pieces, [256])
    follower = Follower(grammars.compile({"type": "string"}), threads, ends=[256], most=0)
    follower.take(ord('"'))
    barred = follower.allowed().barred
    assert barred is not None
    assert 256 <= barred.max() < count
    assert list(follower.forced()) == []  # without a tokenizer


def test_one_that_cannot_go_on_says_so_only_there(vocab: LlamaVocab, threads: ThreadPoolExecutor) -> None:
    follower = follow(vocab, {"type": "integer"}, threads)
    with pytest.raises(InvalidSchema):
        follower.take(vocab._tokenizer.spell("x")[0])
