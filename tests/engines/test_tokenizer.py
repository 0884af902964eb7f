"""Text to tokens with vocabularies of each kind, whatever the text is."""

from __future__ import annotations

import functools
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.errors import InvalidPrompt, PromptTooLong
from engines.llamacpp import tokenizer
from engines.llamacpp.native.model import NativeModel
from engines.llamacpp.tokenizer import Tokenizer
from engines.llamacpp.vocab import LlamaVocab
from testkit.tiny_tokenizers import CONTROL, USER_DEFINED, write_bpe, write_sentencepiece, write_unigram

ONE_MESSAGE = "{% for m in messages %}{{ m.content }}{% endfor %}"
S, END_S = 0, 1  # tokens

PRE_TOKENIZERS = """
    a.x-4.0 afmoe bailingmoe bailingmoe2 bloom chameleon chatglm-bpe codeshell cohere2moe command-r dbrx deepseek-coder
    deepseek-llm deepseek-r1-qwen deepseek-v3 default exaone exaone-moe exaone4 f2llmv2 falcon falcon-h1 falcon3
    gemma4 gigachat glm4 glm5 gpt-2 gpt-4o gpt3-finnish granite-docling granite-embed-multi-311m grok-2
    granite-embed-multi-97m hunyuan hunyuan-dense hy_v4 jais jais-2 jina-de jina-es jina-v1-en jina-v2-code jina-v2-de
    jina-v2-es jina-v5-nano joyai-llm kanana2 kimi-k2 kormo laguna lfm2 llada-moe llama-bpe llama-v3 llama3 llama4
    megrez mellum mellum2 midm-2.0 minerva-7b minicpm5 minimax-m2 modern-bert mpt olmo phi-2 pixtral poro-chat qwen2
    qwen35 refact roberta-bpe seed-coder smaug-bpe smollm solar-open spark2_5 stablelm2 starcoder superbpe talkie
    tekken tiny_aya trillion ufakzeka viking youtu
"""
"""All that llama.cpp knows and that this kind of vocabulary fits."""

RUNS = {
    "letters": "A",
    "digits": "1",
    "spaces": " ",
    "newlines": "\n",
    "punctuation": "!",
    "CJK": "字",
    "combining": "e\u0301",
    "joined emoji": "👩\u200d👧",
}


@pytest.mark.parametrize("pre", PRE_TOKENIZERS.split())
def test_a_long_run_of_one_kind_of_character_is_tokenised(tmp_path: Path, pre: str) -> None:
    """From some 26,000 letters on, llama.cpp's regular expressions overflowed the stack of a usual thread."""
    vocab = LlamaVocab(write_bpe(tmp_path / "model.gguf", pre=pre))
    for run in RUNS.values():
        assert vocab.tokenize(run * ((1 << 16) // len(run.encode())))
    vocab.close()


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("pre", ["gpt-4o", "deepseek-llm", "tekken", "superbpe"])
def test_one_as_long_as_a_body_may_be_is_too(tmp_path: Path, pre: str, run: str) -> None:
    vocab = LlamaVocab(write_bpe(tmp_path / "model.gguf", pre=pre))
    assert vocab.tokenize(run * ((1 << 20) // len(run.encode())))
    vocab.close()


def test_where_there_is_no_room_for_such_a_stack_the_prompt_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocab = LlamaVocab(write_bpe(tmp_path / "model.gguf"))
    monkeypatch.setattr(tokenizer, "_STACK_PER_CHAR", 1 << 40)
    with pytest.raises(InvalidPrompt, match="shorten it"):
        vocab.tokenize("a" * 10_000)
    assert threading.stack_size() == 0
    assert vocab.tokenize("a" * 1000)
    vocab.close()


@pytest.mark.parametrize("kibibytes", [1024, 2048, "unlimited"])
def test_a_usual_thread_may_have_a_small_stack(tmp_path: Path, kibibytes: int | str) -> None:
    """Without a limit, glibc gives a thread 2 MiB, and that was not enough."""
    path = write_bpe(tmp_path / "model.gguf", pre="gpt-4o")
    program = (
        "import sys, threading; from pathlib import Path; from engines.llamacpp.vocab import LlamaVocab\n"
        "vocab = LlamaVocab(Path(sys.argv[1]))\n"
        "thread = threading.Thread(target=lambda: print([len(vocab.tokenize('A' * n)) for n in (1000, 3000, 8192)]))\n"
        "thread.start(); thread.join()"
    )
    shell = 'ulimit -S -s "$0" && exec "$@"'
    done = subprocess.run(
        ["sh", "-c", shell, str(kibibytes), sys.executable, "-c", program, str(path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    if "ulimit" in done.stderr:
        pytest.skip("needs a hard limit of stacks that is not lower")
    assert (done.returncode, done.stdout) == (0, "[1000, 3000, 8192]\n")


@given(data=st.data())
def test_a_long_run_of_blanks_has_the_tokens_it_has_in_one_piece(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    native = _jais(tmp_path_factory.getbasetemp())
    runs = st.sampled_from([1, 2, 511, 512, 513, 1023, 1024, 1025, 1537, 5000])
    blanks = st.builds(lambda blank, count: blank * count, st.sampled_from(" \t\u3000\xa0\x1c"), runs)
    words = st.sampled_from(["aa", "\n", "\r\n", "!", "1", "é", "<s>", "<|b|>", "    "])
    text = "".join(data.draw(st.lists(blanks | words, min_size=1, max_size=8))) + "b" * 9000
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "WHOLE_CHARS", 3)
        assert Tokenizer(native).tokenize(text) == native.tokenize(text)


@functools.lru_cache
def _jais(folder: Path) -> NativeModel:
    words = ["  ", "    ", "ĠĠ", "ĠĠĠĠ", "aa"]
    path = write_bpe(folder / "jais-2.gguf", pre="jais-2", words=words, more={"<|b|>": USER_DEFINED})
    return NativeModel(path, vocab_only=True)


BLANK_TOKENS = {blank * count: USER_DEFINED for blank in ("\n", "\t", " ") for count in range(2, 32)}


@pytest.mark.parametrize("blank", ["\n", "\t", " "])
@pytest.mark.parametrize("kind", ["jais-2", "sentencepiece", "sentencepiece that has tokens for such runs"])
def test_the_time_for_blanks_grows_with_their_number(tmp_path: Path, kind: str, blank: str) -> None:
    """16 times as many took more than 200 times as long; 60,000 of them 75 s with Gemma's vocabulary."""
    path = tmp_path / "model.gguf"
    if kind == "jais-2":
        write_bpe(path, pre=kind)
    else:
        write_sentencepiece(path, more=BLANK_TOKENS if "tokens" in kind else None)
    vocab = LlamaVocab(path)

    def seconds(count: int) -> float:
        begun = time.process_time()  # a long text has a thread of its own
        assert vocab.tokenize(blank * count)
        return time.process_time() - begun

    few = min(seconds(10_000) for _ in range(3))
    assert seconds(160_000) < 48 * few + 0.05
    vocab.close()


def test_what_could_begin_one_of_many_control_tokens_takes_no_time(tmp_path: Path) -> None:
    """With Gemma's vocabulary, 60,000 of these took 1.7 s, and a megabyte 25 s."""
    unused = {f"<unused{number}>": CONTROL for number in range(3000)}
    native = NativeModel(write_sentencepiece(tmp_path / "model.gguf", more=unused), vocab_only=True)
    opened = Tokenizer(native)
    text = "<" * 60_000
    begun = time.thread_time()
    expected = native.tokenize(text)
    theirs_s = time.thread_time() - begun
    begun = time.thread_time()
    assert opened.tokenize(text) == expected
    assert time.thread_time() - begun < theirs_s / 4
    native.close()


@pytest.mark.parametrize("write", [write_bpe, write_sentencepiece])
@pytest.mark.parametrize("place", [0, 700, 1400, 2000])
@pytest.mark.parametrize("spelled", ["", "<s>", "<|u|>", "<s", "x", "<u>"])
def test_a_long_text_spells_control_tokens_wherever_they_are(
    tmp_path: Path, write: Callable[..., Path], place: int, spelled: str
) -> None:
    more = {"<|u|>": USER_DEFINED, "<u>": CONTROL}
    for further in ({}, {"x": CONTROL}):
        native = NativeModel(write(tmp_path / "model.gguf", more=more | further), vocab_only=True)
        text = "<ab" * (place // 3) + spelled + "<ab" * ((2000 - place) // 3)
        assert Tokenizer(native).tokenize(text) == native.tokenize(text)
        native.close()


@pytest.mark.parametrize("digits", [1, 98, 99, 100, 197, 198, 199, 1000, 1999])
def test_a_long_number_has_the_tokens_it_has_in_one_piece(tmp_path: Path, digits: int) -> None:
    native = NativeModel(write_bpe(tmp_path / "model.gguf", pre="superbpe", words=["11", "1111"]), vocab_only=True)
    text = f"aa {'1' * digits} aa" + "b" * 9000
    assert Tokenizer(native).tokenize(text) == native.tokenize(text)
    native.close()


# --- the beginning and the end ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [write_bpe, write_sentencepiece])
@pytest.mark.parametrize("add_eos", [False, True])
@pytest.mark.parametrize(
    ("add_bos", "prompt", "beginning"),
    [
        (True, "ab", [S]),
        (True, "<s>ab", [S]),
        (True, "<s><s>ab", [S, S]),
        (False, "ab", []),
        (False, "<s><s>ab", [S, S]),
        (False, "ab</s>", []),
    ],
)
def test_a_prompt_begins_as_the_vocabulary_wants_and_goes_on(
    tmp_path: Path, write: Callable[..., Path], add_bos: bool, add_eos: bool, prompt: str, beginning: list[int]
) -> None:
    """Only what is missing is added, nothing of the prompt is taken away, and no end stands before the answer."""
    vocab = LlamaVocab(write(tmp_path / "model.gguf", add_bos=add_bos, add_eos=add_eos, chat_template=ONE_MESSAGE))
    tokens = vocab.tokenize(prompt)
    begins = len(beginning)
    assert tokens[:begins] == beginning
    assert S not in tokens[begins:]
    assert (END_S in tokens) == ("</s>" in prompt)
    chat = vocab.tokenize_chat([{"role": "user", "content": "ab"}]).tokens
    assert chat == vocab.tokenize("ab")
    vocab.close()


def test_a_vocabulary_that_wants_a_beginning_and_has_none_does_without(tmp_path: Path) -> None:
    """llama.cpp ended the process at its first prompt."""
    vocab = LlamaVocab(write_unigram(tmp_path / "model.gguf", bos=None, add_bos=True))
    assert vocab.tokenize("a") == [5]
    vocab.close()


def test_nothing_false_is_said_of_two_beginnings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    vocab = LlamaVocab(write_bpe(tmp_path / "model.gguf", add_bos=True))
    caplog.set_level(logging.DEBUG)
    vocab.tokenize("<s>ab")
    assert "BOS" not in caplog.text
    vocab.close()


# --- users' text in a conversation -----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["sentencepiece", "sentencepiece, no space in front", "BPE"])
def chat(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaVocab]:
    path = tmp_path_factory.mktemp("chat") / "model.gguf"
    more = {"<|end|>": USER_DEFINED, "<table>": USER_DEFINED, "<|sys|>": CONTROL}
    template = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
    if request.param == "BPE":
        write_bpe(path, more=more, chat_template=template)
    else:
        prefix = request.param == "sentencepiece"
        write_sentencepiece(path, more=more, chat_template=template, add_space_prefix=prefix)
    found = LlamaVocab(path)
    yield found
    found.close()


def spelled(vocab: LlamaVocab, tokens: Sequence[int]) -> str:
    return b"".join(vocab._native.piece(token, special=True) for token in tokens).decode()


SPECIAL = {"</s>": 1, "<|end|>": 2, "<table>": 3, "<|sys|>": 4}
fragments = st.sampled_from([*SPECIAL, "a", "b", " ", "  ", "<", "|", "<|", "end|>", "/s>", "\n", "é", "字", "\ue0fe"])


@given(st.lists(fragments, min_size=1, max_size=12).map("".join))
def test_a_users_text_stays_as_it_is_and_is_text(chat: LlamaVocab, content: str) -> None:
    tokens = chat.tokenize_chat([{"role": "user", "content": content}]).tokens
    written = spelled(chat, tokens)
    if chat.tokenize("a") == chat.tokenize(" a")[1:]:  # a space goes before each text
        written, content = written.replace(" ", ""), content.replace(" ", "")
    assert written == f"{content}<|end|>"
    assert tokens[-1] == SPECIAL["<|end|>"]
    assert not set(tokens[:-1]) & {SPECIAL["</s>"], SPECIAL["<|end|>"], SPECIAL["<|sys|>"]}
    if content.count("<table>") == 1:
        assert SPECIAL["<table>"] in tokens


def test_no_space_comes_into_a_text_that_spells_a_control_token(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
    path = write_sentencepiece(tmp_path / "model.gguf", more={"<|end|>": CONTROL}, chat_template=template)
    vocab = LlamaVocab(path)
    tokens = vocab.tokenize_chat([{"role": "user", "content": "a </s> b<|end|>a"}]).tokens
    assert spelled(vocab, tokens) == " a </s> b<|end|>a<|end|>"
    assert tokens.count(SPECIAL["<|end|>"]) == 1
    vocab.close()


# --- long texts ------------------------------------------------------------------------------------------------------

words = st.sampled_from(["a", "b", "ab", " ", "  ", "   ", "字", "é", "\n", "<s>", "</s>", "aab", " ab"])


@pytest.mark.parametrize("prefix", [True, False])
@given(data=st.data())
def test_a_long_text_has_the_tokens_it_has_in_one_piece(
    tmp_path_factory: pytest.TempPathFactory, prefix: bool, data: st.DataObject
) -> None:
    native = _sentencepiece(tmp_path_factory.getbasetemp(), prefix)
    text = "".join(data.draw(st.lists(words, min_size=1, max_size=60)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "WHOLE_CHARS", 3)
        cut = Tokenizer(native)
        pieces = list(cut._pieces(text, goes_on=False))
        tokens = cut.tokenize(text)
    assert "".join(piece for piece, _ in pieces) == text
    assert tokens == native.tokenize(text)


@functools.lru_cache
def _sentencepiece(folder: Path, prefix: bool) -> NativeModel:
    return NativeModel(write_sentencepiece(folder / f"{prefix}.gguf", add_space_prefix=prefix), vocab_only=True)


def test_a_long_text_is_not_read_to_its_end_where_it_is_too_long_anyway(tmp_path: Path) -> None:
    vocab = LlamaVocab(write_sentencepiece(tmp_path / "model.gguf"))
    read: list[int] = []
    tokenize = vocab._native.tokenize

    def counted(text: str, *, parse_special: bool) -> list[int]:
        read.append(len(text))
        return tokenize(text, parse_special=parse_special)

    vocab._native.tokenize = counted  # type: ignore[method-assign,assignment]
    with pytest.raises(PromptTooLong) as caught:
        vocab.tokenize("字" * 300_000, at_most=60_000)
    assert 60_000 < caught.value.tokens <= sum(read) * 3 < 100_000
    vocab.close()


def test_a_text_that_must_have_too_many_tokens_is_not_read_at_all(tmp_path: Path) -> None:
    vocab = LlamaVocab(write_bpe(tmp_path / "model.gguf", words=["aa", "aaaa"]))
    vocab._native.tokenize = None  # type: ignore[method-assign,assignment]
    with pytest.raises(PromptTooLong) as caught:
        vocab.tokenize("a" * 500_000, at_most=100_000)
    assert caught.value.tokens == 100_000
    vocab.close()
