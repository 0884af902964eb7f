"""Text and conversations to tokens, by the tokenizers of real files."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engines.errors import EngineDead, InvalidPrompt
from engines.llamacpp.chat import ChatTemplate
from engines.llamacpp.native.model import NativeModel
from engines.llamacpp.spelling import Cuts
from engines.llamacpp.vocab import LlamaVocab
from testkit.tiny_gguf import BOS, CHATML, EOS, IM_END, IM_START, UNKNOWN, write_tiny_llama

TRIMMING = CHATML.replace("message['content']", "message['content'] | trim")
BARE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def test_a_model_without_a_template_asks_for_a_prompt(tmp_path: Path) -> None:
    vocab = LlamaVocab(write_tiny_llama(tmp_path / "bare.gguf", chat_template=None))
    with pytest.raises(InvalidPrompt, match=r"bare\.gguf has no chat template; send prompt"):
        vocab.tokenize_chat([{"role": "user", "content": "Hello"}])
    vocab.close()


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (None, "bare.gguf has no chat template; send prompt instead of messages"),
        (5, "the model's chat template leaves out what the user says; send prompt instead"),
        (["a", "b"], "bare.gguf has no chat template; send prompt instead of messages"),
        ("{% nothing %}", "the model's chat template cannot be used; send prompt instead"),
        ("{{ raise_exception('Not today') }}", "the model's chat template rejects these messages: Not today"),
    ],
    ids=["none", "a number", "a list", "no Jinja", "a refusal"],
)
def test_a_template_that_cannot_work_is_a_warning_at_once_and_prompts_go_on(
    tmp_path: Path, template: str | int | list[str] | None, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    vocab = LlamaVocab(write_tiny_llama(tmp_path / "bare.gguf", chat_template=template))
    [record] = [record for record in caplog.records if record.name == "engines.llamacpp.vocab"]
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith(f"bare.gguf: conversations will be refused, only prompts work: {why}")
    with pytest.raises(InvalidPrompt, match=re.escape(why)):
        vocab.tokenize_chat([{"role": "user", "content": "Hello"}])
    assert vocab.tokenize("Hello")
    vocab.close()


def test_a_template_knows_the_vocabularys_tokens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    template = "{{ bos_token }}{{ unk_token }}{{ messages[0].content }}{{ eos_token }}"
    vocab = LlamaVocab(write_tiny_llama(tmp_path / "tokens.gguf", chat_template=template))
    tokens = vocab.tokenize_chat([{"role": "user", "content": "a"}]).tokens
    assert (tokens[0], tokens[1], tokens[-1]) == (BOS, UNKNOWN, EOS)
    assert "conversations" not in caplog.text
    vocab.close()


def test_the_variables_of_a_task_reach_the_template(tmp_path: Path) -> None:
    template = "{{ messages[0].content }}{% if not enable_thinking %}<|im_end|>{% endif %}"
    vocab = LlamaVocab(write_tiny_llama(tmp_path / "thinks.gguf", chat_template=template))
    asked = [{"role": "user", "content": "a"}]
    without = vocab.tokenize_chat(asked, arguments={"enable_thinking": False}).tokens
    assert without == [*vocab.tokenize_chat(asked).tokens, IM_END]
    vocab.close()


def test_a_closed_vocabulary_says_so(tiny_model_path: Path) -> None:
    vocab = LlamaVocab(tiny_model_path)
    vocab.close()
    vocab.close()
    with pytest.raises(EngineDead):
        vocab.tokenize("Hello")
    with pytest.raises(EngineDead):
        vocab.tokenize_chat([{"role": "user", "content": "Hello"}])


def test_closing_waits_for_a_call_on_another_thread(tiny_model_path: Path) -> None:
    vocab = LlamaVocab(tiny_model_path)
    expected = vocab.tokenize(text := "The river and my house " * 200)
    begun = threading.Barrier(5)

    def tokenize() -> bool:
        begun.wait()
        try:
            while True:
                assert vocab.tokenize(text) == expected
        except EngineDead:
            return True

    with ThreadPoolExecutor(4) as pool:
        ended = [pool.submit(tokenize) for _ in range(4)]
        begun.wait()
        vocab.tokenize(text)
        vocab.close()
        assert all(future.result() for future in ended)


def test_half_a_surrogate_pair_is_refused(tiny_model_path: Path) -> None:
    vocab = LlamaVocab(tiny_model_path)
    with pytest.raises(InvalidPrompt, match="surrogate"):
        vocab.tokenize("a\ud800")
    vocab.close()


def test_the_beginning_of_sequence_is_not_doubled(tiny_model_path: Path, tmp_path: Path) -> None:
    vocab = LlamaVocab(tiny_model_path)
    assert vocab.tokenize("<s>Hello").count(BOS) == 1
    assert vocab.tokenize("") == [BOS]
    vocab.close()
    with_bos = LlamaVocab(write_tiny_llama(tmp_path / "bos.gguf", chat_template="{{ bos_token }}" + CHATML))
    assert with_bos.tokenize_chat([{"role": "user", "content": "Hello"}]).tokens.count(BOS) == 1
    with_bos.close()


class Opened:
    """A vocabulary, and the same file's tokenizer without any care."""

    def __init__(self, path: Path) -> None:
        self.vocab, self.native = LlamaVocab(path), NativeModel(path, vocab_only=True)

    @lru_cache  # noqa: B019
    def is_control(self, token: int) -> bool:
        return self.native.is_control(token)

    def controls(self, *contents: str) -> list[int]:
        """The control tokens of a conversation, in order."""
        tokens = self.vocab.tokenize_chat([{"role": "user", "content": content} for content in contents]).tokens
        return [token for token in tokens if self.is_control(token)]


@pytest.fixture(scope="module", params=["tiny", "tiny, trimming", "tiny, bare", "smollm2"])
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    templates = {"tiny": CHATML, "tiny, trimming": TRIMMING, "tiny, bare": BARE}
    if request.param == "smollm2":
        path = request.getfixturevalue("smollm2_path")
    else:
        path = tmp_path_factory.mktemp("chat") / "tiny.gguf"
        write_tiny_llama(path, chat_template=templates[request.param])
    found = Opened(path)
    yield found
    found.vocab.close()
    found.native.close()


def test_what_is_told_of_all_tokens_is_what_is_told_of_each(opened: Opened) -> None:
    native = opened.native
    tokens = range(native.n_vocab)
    assert native.controls == [token for token in tokens if native.is_control(token)]
    assert native.specials == [token for token in tokens if native.is_special(token)]
    assert native.pieces() == [native.piece(token, special=True) for token in tokens]
    assert native.eos in native.ends
    assert set(native.ends) <= set(native.controls)


FRAGMENTS = """
    <|im_start|> <|im_end|> <|im_ start|> end|> <| |> < > </s> <s> s> </ <unk> <|endoftext|> <|endof text|> user a é 🙂
"""
fragments = st.sampled_from([*FRAGMENTS.split(), "\n", " ", "\t", "\u2003", "\U000f0000"])
contents = st.lists(fragments, max_size=12).map("".join)
harmless = st.text(st.characters(codec="utf-8", exclude_characters="<"), max_size=20) | st.text("<>|/_ \n")


@given(st.lists(contents, min_size=1, max_size=3))
def test_no_message_makes_a_control_token(opened: Opened, contents: list[str]) -> None:
    assert opened.controls(*contents) == opened.controls(*["Hello"] * len(contents))


@given(st.lists(harmless, min_size=1, max_size=3))
def test_text_without_control_texts_is_tokenised_in_one_piece(opened: Opened, contents: list[str]) -> None:
    messages = [{"role": "user", "content": content} for content in contents]
    source = opened.native.chat_template
    assert source is not None
    bos, eos = (opened.native.piece(token, special=True).decode() for token in (opened.native.bos, opened.native.eos))
    plain = ChatTemplate(source, bos=bos, eos=eos, controls=[]).render(messages).text
    tokens = opened.vocab.tokenize_chat(messages).tokens
    assert tokens == opened.native.tokenize(plain, add_special=True, parse_special=True)


def test_the_template_still_makes_its_control_tokens(tiny_model_path: Path) -> None:
    vocab = LlamaVocab(tiny_model_path)
    tokens = vocab.tokenize_chat([{"role": "user", "content": "<|im_end|>"}]).tokens
    assert (tokens.count(IM_START), tokens.count(IM_END)) == (2, 1)
    vocab.close()


# --- long texts ------------------------------------------------------------------------------------------------------

SPECIALS = {"<s>": False, "</s>": False, "<|a|>": True, "<|a|><": False, "x": False}


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("<s>one</s>two", ["<s>", "one</s>two"]),  # behind the last one there is nothing to save
        ("one<s>", ["one<s>"]),
        ("one", ["one"]),
        ("", [""]),
        ("<s> one</s> <s>", ["<s>", " one</s>", " <s>"]),
        ("<|a|> \n one<s>", ["<|a|> \n ", "one<s>"]),  # it swallows blanks
        ("<|a|><s>one<s>", ["<|a|><s>one<s>"]),  # which of the overlapping ones it is, is llama.cpp's affair
    ],
)
def test_a_long_text_is_cut_behind_special_tokens_that_stand_alone(text: str, pieces: list[str]) -> None:
    cut = list(Cuts(SPECIALS).pieces(text, at_least=1))
    assert cut == pieces


def test_a_text_that_is_not_long_is_not_cut() -> None:
    assert list(Cuts(SPECIALS).pieces("<s>" * 100)) == ["<s>" * 100]


@pytest.mark.parametrize("model", ["tiny_model_path", "smollm2_path"])
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_pieces_have_the_tokens_of_the_whole(
    request: pytest.FixtureRequest, model: str, data: st.DataObject
) -> None:
    native, cuts = _cuts_of(request.getfixturevalue(model))
    spelled = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<unk>"]
    around = [" ", "\n", "  ", "the", " river", "<", "|", ">", "é", "<|im", "_end|>", "s>"]
    parts = data.draw(st.lists(st.sampled_from(spelled) | st.sampled_from(around), max_size=30))
    text = "".join(parts)
    tokens: list[int] = []
    for number, piece in enumerate(cuts.pieces(text, at_least=1)):
        tokens += native.tokenize(piece, add_special=number == 0, parse_special=True)
    assert tokens == native.tokenize(text, add_special=True, parse_special=True)


@lru_cache
def _cuts_of(path: Path) -> tuple[NativeModel, Cuts]:
    vocab = LlamaVocab(path)
    return vocab._native, vocab._tokenizer.cuts


def test_the_time_for_many_special_tokens_grows_with_their_number(tiny_model_path: Path) -> None:
    """Eight times as many took more than fifty times as long."""
    vocab = LlamaVocab(tiny_model_path)

    def seconds(count: int) -> float:
        begun = time.thread_time()
        assert len(vocab.tokenize("<|im_end|>" * count)) == count + 1
        return time.thread_time() - begun

    few = min(seconds(2500) for _ in range(3))
    assert min(seconds(20_000) for _ in range(3)) < 24 * few
    vocab.close()
