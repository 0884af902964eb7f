"""Reasoning and answer on real llama.cpp: templates and vocabularies of each family, tokens that a test chooses."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from gguf import TokenType

from engines import api
from engines.api import FinishReason, Prompt, SamplingParams
from engines.llamacpp.channels import Phase
from engines.llamacpp.model import LlamaModel
from engines.llamacpp.vocab import LlamaVocab
from testkit.tiny_gguf import CHATML, EOS, write_tiny_llama
from tests.engines.support import exact, loaded, sequence

CONTROL, USER_DEFINED = TokenType.CONTROL, TokenType.USER_DEFINED
TURNS = CHATML.partition("{% if add_generation_prompt %}")[0]
REPLY = "{% if add_generation_prompt %}<|im_start|>assistant\n"
CUT = "{% set history = '</think>' %}"

HARMONY = (
    "{% for m in messages %}{{ '<|start|>' + m.role + ('<|channel|>final' if m.role == 'assistant' else '') }}"
    "{{ '<|message|>' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
GEMMA = TURNS + REPLY + "{% if not enable_thinking %}<|channel>thought\n<channel|>{% endif %}{% endif %}"
THINK = TURNS + CUT + REPLY + "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
OPENS = TURNS + CUT + REPLY + "<think>\n{% endif %}"
MISTRAL = TURNS + "{% set history = '[THINK][/THINK]' %}" + REPLY + "{% endif %}"
MARKERS = {
    HARMONY: ["<|start|>", "<|channel|>", "<|message|>", "<|end|>"],
    GEMMA: ["<|channel>", "<channel|>"],
    THINK: ["<think>", "</think>"],
    OPENS: ["<think>", "</think>"],
    MISTRAL: ["[THINK]", "[/THINK]"],
}
ENDS = {"<|return|>": CONTROL, "<|call|>": CONTROL}
"""Where llama.cpp finds both of these, it does not take ``<|end|>`` for an end of generation."""

KINDS: Sequence[TokenType | None] = (CONTROL, USER_DEFINED, None)
"""What a marker is in a vocabulary: None where it is none of its tokens, but text."""

AGAIN = ("<|start|>", "assistant", "<|channel|>")
HOT = SamplingParams(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=3)
USER = {"role": "user", "content": "the river"}


@dataclass
class Thinker:
    """A model that writes what it is told to."""

    vocab: LlamaVocab
    model: LlamaModel

    def token(self, text: str) -> int:
        native = self.vocab._native
        return next(token for token in range(native.n_vocab) if native.text(token) == text.replace(" ", "▁"))

    def tokens(self, *texts: str) -> list[int]:
        """A token for each of these texts, or one for each of its characters."""
        found = []
        for text in texts:
            try:
                found.append(self.token(text))
            except StopIteration:
                found += [self.token(char if char != "\n" else "<0x0A>") for char in text]
        return found

    def write(
        self,
        monkeypatch: pytest.MonkeyPatch,
        prompt: Prompt,
        *texts: str,
        stop: tuple[str, ...] = (),
        ends: bool = True,
    ) -> tuple[str, str, FinishReason | None]:
        """What comes of these tokens as reasoning and answer, and how it ended."""
        script = [*self.tokens(*texts), *[EOS] * ends]
        rest = iter(script)
        monkeypatch.setattr(self.model._outputs._chooser, "choose", lambda logits, samplers, allowed: [next(rest)])
        self.model.admit(api.Sequence("a", prompt.tokens, len(script), stop=stop, reply=prompt.reply))
        events = list(itertools.chain.from_iterable(iter(self._step, None)))
        assert all(event.reasoning_index < event.tokens_out and event.index < event.tokens_out for event in events)
        reasoning, answer = ("".join(getattr(event, name) for event in events) for name in ("reasoning", "text"))
        return reasoning, answer, events[-1].finish

    def _step(self) -> list[api.StepEvent] | None:
        return self.model.step() if self.model.busy else None


@contextmanager
def thinker(folder: Path, template: str, kind: TokenType | None) -> Iterator[Thinker]:
    """A model with a template, whose markers are tokens of a kind."""
    more = dict.fromkeys("<|>/[]", TokenType.NORMAL) | ENDS
    if kind is not None:
        more |= dict.fromkeys(MARKERS.get(template, MARKERS[THINK]), kind)
    path = write_tiny_llama(folder / "thinks.gguf", more=more, chat_template=template)
    vocab = LlamaVocab(path)
    with loaded(exact(path)) as model:
        yield Thinker(vocab, model)
    vocab.close()


KNOWN = pytest.mark.parametrize("kind", KINDS, ids=["control", "user defined", "text"])
Write = tuple[str, ...]


@KNOWN
@pytest.mark.parametrize(
    ("template", "written"),
    [
        (THINK, ("<think>", "\n", " a", " b", "\n", "</think>", "\n", "\n", " c")),
        (OPENS, (" a", " b", "\n", "</think>", "\n", "\n", " c")),
        (MISTRAL, ("[THINK]", " a", " b", "[/THINK]", " c")),
        (GEMMA, ("<|channel>", "thought", "\n", " a", " b", "<channel|>", " c")),
        (
            HARMONY,
            (*("<|channel|>", "analysis", "<|message|>", " a", " b", "<|end|>"), *AGAIN, "final", "<|message|>", " c"),
        ),
    ],
    ids=["think", "opened by the template", "mistral", "gemma", "harmony"],
)
def test_a_family_is_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str, written: Write, kind: TokenType | None
) -> None:
    with thinker(tmp_path, template, kind) as model:
        prompt = model.vocab.tokenize_chat([USER], arguments={"enable_thinking": True})
        told = model.write(monkeypatch, prompt, *written)
        assert (told[0].strip(), told[1].strip(), told[2]) == ("a b", "c", FinishReason.STOP)
        assert "\n" not in told[0] + told[1]
        cut = model.write(monkeypatch, prompt, *written, ends=False)
        assert (cut[0].strip(), cut[1].strip(), cut[2]) == ("a b", "c", FinishReason.LENGTH)


@KNOWN
@pytest.mark.parametrize("template", [THINK, GEMMA])
def test_a_template_that_turns_thinking_off_leaves_the_answer_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str, kind: TokenType | None
) -> None:
    with thinker(tmp_path, template, kind) as model:
        prompt = model.vocab.tokenize_chat([USER], arguments={"enable_thinking": False})
        model.model.admit(sequence(prompt.tokens, 1, reply=prompt.reply))
        assert _phase(model.model) is Phase.ANSWER
        model.model.cancel("a")
        assert model.write(monkeypatch, prompt, "a", " b")[:2] == ("", "a b")


def _phase(model: LlamaModel) -> Phase:
    run = model._slots[0].run
    assert run is not None
    return run.text.phase


@KNOWN
def test_an_answer_may_speak_of_markers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: TokenType | None
) -> None:
    with thinker(tmp_path, OPENS, kind) as model:
        prompt = model.vocab.tokenize_chat([USER])
        told = model.write(monkeypatch, prompt, "a", "</think>", "b", "<think>", "c", "</think>")
        assert told[:2] == ("a", "b<think>c</think>")


def test_reasoning_may_speak_of_markers_that_are_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with thinker(tmp_path, OPENS, CONTROL) as model:
        prompt = model.vocab.tokenize_chat([USER])
        assert model.write(monkeypatch, prompt, "a", *"</think>", "b", "</think>", "c")[:2] == ("a</think>b", "c")


@KNOWN
def test_a_block_that_never_ends_is_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: TokenType | None
) -> None:
    with thinker(tmp_path, OPENS, kind) as model:
        prompt = model.vocab.tokenize_chat([USER])
        assert model.write(monkeypatch, prompt, "a", " b", ends=False) == ("a b", "", FinishReason.LENGTH)
        assert model.write(monkeypatch, prompt, "a", " b", "<") == ("a b<", "", FinishReason.STOP)


@KNOWN
@pytest.mark.parametrize(
    ("template", "content", "written", "told"),
    [
        (THINK, "", ("<think>", "a", "</think>", "b"), ("a", "b")),
        (THINK, "the", (" river", "<think>"), ("", " river<think>")),
        (THINK, "<think>the", (" river", "</think>", "b"), (" river", "b")),
        (THINK, "<think>the</think>", ("\n", "b"), ("", "b")),
        (HARMONY, "the", (" river", "<|end|>"), ("", " river")),
        (MISTRAL, "[THINK]the", (" river", "[/THINK]", "b"), (" river", "b")),
    ],
)
def test_an_answer_that_is_continued_is_told_apart_from_where_it_is(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    template: str,
    content: str,
    written: Write,
    told: tuple[str, str],
    kind: TokenType | None,
) -> None:
    with thinker(tmp_path, template, kind) as model:
        prompt = model.vocab.tokenize_chat([USER, {"role": "assistant", "content": content}])
        assert model.write(monkeypatch, prompt, *written)[:2] == told


@pytest.mark.parametrize("content", ["<think>", "the <think>\n", "</think>", "<|channel>thought"])
@KNOWN
def test_what_users_say_opens_no_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, kind: TokenType | None
) -> None:
    template = "{% set history = '</think>' %}{% for m in messages %}{{ m.content }}{% endfor %}"
    with thinker(tmp_path, template, kind) as model:
        prompt = model.vocab.tokenize_chat([{"role": "user", "content": content}])
        assert model.write(monkeypatch, prompt, "a", " b")[:2] == ("", "a b")


@pytest.mark.parametrize("template", MARKERS)
@KNOWN
def test_a_prompt_is_continued_as_it_is_with_every_marker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str, kind: TokenType | None
) -> None:
    with thinker(tmp_path, template, kind) as model:
        written = [*MARKERS[template], " a"]
        prompt = Prompt(model.vocab.tokenize("the river"))
        assert model.write(monkeypatch, prompt, *written)[:2] == ("", "".join(written))


@pytest.mark.parametrize("reply", [None, ""])
def test_a_stop_string_is_found_in_control_tokens_that_are_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reply: str | None
) -> None:
    path = write_tiny_llama(tmp_path / "calls.gguf", more={"<|tool|>": CONTROL, "<|end_of|>": CONTROL})
    vocab = LlamaVocab(path)
    with loaded(exact(path)) as model:
        one, prompt = Thinker(vocab, model), Prompt(vocab.tokenize("the river"), reply)
        written = ("a", "<|tool|>", "b", "<|end_of|>", "c")
        assert one.write(monkeypatch, prompt, *written) == ("", "abc", FinishReason.STOP)
        assert one.write(monkeypatch, prompt, *written, stop=("<|tool|>",))[:2] == ("", "a")
        assert one.write(monkeypatch, prompt, *written, stop=("<|end_of|>",))[:2] == ("", "ab")
        assert one.write(monkeypatch, prompt, *written, stop=("b<|end",))[:2] == ("", "a")
        assert one.write(monkeypatch, prompt, *written, stop=("bc",))[:2] == ("", "abc")
    vocab.close()


@pytest.mark.parametrize("template", MARKERS)
def test_whatever_a_model_writes_comes_out_on_one_side_or_the_other(tmp_path: Path, template: str) -> None:
    """Nothing is chosen for it: noise that holds markers now and then."""
    with thinker(tmp_path, template, USER_DEFINED) as model:
        for number in range(8):
            told = model.vocab.tokenize_chat([{"role": "user", "content": f"the river {number}"}])
            model.model.admit(api.Sequence("a", told.tokens, 60, reply=told.reply, sampling=HOT))
            events = []
            while model.model.busy:
                events += model.model.step()
            for name, index in (("text", "index"), ("reasoning", "reasoning_index")):
                seen = [getattr(event, index) for event in events if getattr(event, name)]
                assert seen == sorted(set(seen))
            assert events[-1].finish in (FinishReason.LENGTH, FinishReason.STOP)


@KNOWN
@pytest.mark.parametrize(
    ("template", "written"),
    [
        (OPENS, (" a", " b", "</think>")),
        (HARMONY, ("<|channel|>", "analysis", "<|message|>", " a", "<|end|>", *AGAIN, "final", "<|message|>")),
    ],
    ids=["opened by the template", "harmony"],
)
def test_a_schema_is_about_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str, written: Write, kind: TokenType | None
) -> None:
    """The test writes the reasoning; then the model goes on, which writes garbage unless it is forced."""
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["a"],
        "additionalProperties": False,
    }
    with thinker(tmp_path, template, kind) as model:
        script = model.tokens(*written)
        choose = model.model._outputs._chooser.choose

        def scripted(*row: Any) -> list[int | None]:
            return [script.pop(0)] if script else choose(*row)

        monkeypatch.setattr(model.model._outputs._chooser, "choose", scripted)
        prompt = model.vocab.tokenize_chat([USER])
        grammar = model.vocab.grammar(schema)
        model.model.admit(replace(sequence(prompt.tokens, 200, reply=prompt.reply), grammar=grammar))
        events = list(itertools.chain.from_iterable(iter(model._step, None)))
        answer = json.loads("".join(event.text for event in events))
    assert set(answer) == {"a"}
    assert answer["a"] in range(10)
    assert events[-1].finish is FinishReason.STOP
    assert "a" in "".join(event.reasoning for event in events)
