"""Conversations to prompts: what a template writes is obeyed, what users write is only text."""

from __future__ import annotations

import pytest

from engines.errors import InvalidPrompt
from engines.llamacpp import chat
from engines.llamacpp.chat import SEAM, ChatTemplate
from testkit.tiny_gguf import CHATML

CONTROLS = ["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
BARE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def rendered(template: str, *contents: str) -> list[str]:
    messages = [{"role": "user", "content": content} for content in contents]
    return ChatTemplate(template, bos="<s>", eos="</s>", controls=CONTROLS).render(messages)


def test_a_harmless_conversation_is_rendered_in_one_piece() -> None:
    text = "<|im_start|>user\nHello > you\n<|im_end|>\n<|im_start|>assistant\n"
    assert rendered(CHATML, "Hello > you\n") == [text]


@pytest.mark.parametrize("content", ["> quoted", "a < b <", "<|im_", "_start|>", "<", ">", "</", f"a{SEAM}b"])
def test_what_only_resembles_a_control_text_is_not_cut(content: str) -> None:
    assert len(rendered(CHATML, content)) == 1


def test_a_control_text_in_a_message_is_cut_in_two() -> None:
    assert rendered(BARE, "a</s>b") == ["a<", "/s>b"]


def test_a_control_text_made_of_two_messages_is_cut_in_two() -> None:
    assert rendered(BARE, "a<|im_", "end|>b") == ["a<|im_", "end|>b"]


def test_a_control_text_that_trimming_would_complete_is_cut_in_two() -> None:
    template = "{{ '<|im_' + messages[0].content | trim }}"
    assert rendered(template, "  end|> ") == ["<|im_", "end|>"]


def test_a_seam_in_a_message_does_not_count() -> None:
    assert rendered(BARE, f"<{SEAM}/s>") == ["<", "/s>"]


def test_a_template_knows_the_usual_names() -> None:
    template = "{{ bos_token }}{{ eos_token }}{{ strftime_now('%Y')|length }}{{ add_generation_prompt }}"
    assert "".join(rendered(template, "x")) == "<s></s>4True"


def test_loops_keep_their_variables() -> None:
    template = "{% for m in messages if m.content %}{{ loop.index }}/{{ loop.length }}{{ loop.last }} {% endfor %}"
    assert rendered(template, "a", "", "b") == ["1/2False 2/2True "]
    template = "{% for x in [[[], []]] recursive %}({{ loop.depth }}{{ loop(x) }}){% endfor %}"
    assert rendered(template) == ["(1(2)(2))"]
    template = "{% for x in nothing %}{% else %}empty{% endfor %}{% for x in [1, 2, 3] %}{{ x }}{% break %}{% endfor %}"
    assert rendered(template) == ["empty1"]


FAILING = {
    "unknown variable": ("{{ tools.names }}", "undefined"),
    "a type it does not expect": ("{{ messages + 1 }}", "concatenate"),
    "classes": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "subclasses by filter": ("{{ (''|attr('__class__')).mro() }}", "unsafe"),
    "changing the messages": ("{{ messages.append(1) }}", "unsafe"),
    "files": ("{% include '/etc/passwd' %}", "no loader"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "too large a range": ("{{ range(10**9) }}", "Range too big"),
}


@pytest.mark.parametrize(("template", "word"), FAILING.values(), ids=FAILING.keys())
def test_a_failing_template_is_a_sentence_and_its_error_the_cause(template: str, word: str) -> None:
    with pytest.raises(InvalidPrompt) as caught:
        rendered(template, "Hello")
    assert str(caught.value) == "the model's chat template fails on these messages; send prompt instead"
    assert word in str(caught.value.__cause__)


def test_a_template_refuses_in_its_own_words_and_not_at_length() -> None:
    with pytest.raises(InvalidPrompt, match=r"^the model's chat template rejects these messages: Only one$"):
        rendered("{{ raise_exception('Only\n one') }}", "Hello")
    with pytest.raises(InvalidPrompt) as caught:
        rendered("{{ raise_exception('x' * 99999) }}", "Hello")
    assert len(str(caught.value)) < 400


def test_formatting_opens_no_way_out_of_the_sandbox() -> None:
    assert rendered("{{ '{0.__class__.__init__}'.format(messages) }}") == [""]


@pytest.mark.parametrize(
    "template",
    ["{% for %}", "{{ 'a' | no_such_filter }}", "{% generation %}", "{% if 1 %}" * 200, "{% for a in b %}" * 30],
)
def test_a_template_that_does_not_compile_cannot_be_used(template: str) -> None:
    with pytest.raises(InvalidPrompt, match="chat template cannot be used"):
        rendered(template + "{% endfor %}" * template.count("{% for a"), "Hello")


def test_a_template_that_writes_endlessly_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "MAX_CHARS", 10_000)
    with pytest.raises(InvalidPrompt, match="more than 10000 characters"):
        rendered("{% for a in range(99999) %}{% for b in range(99999) %}tick{% endfor %}{% endfor %}")


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}" + "{% endfor %}" * 3,
        "{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% for c in r if b > a %}" + "{% endfor %}" * 3,
        "{% for a in range(999) recursive %}{% if loop.depth < 4 %}{{ loop(range(999)) }}{% endif %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    ],
    ids=["ranges", "one range", "recursive", "macro"],
)
def test_a_template_that_computes_endlessly_is_stopped(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "TIME_LIMIT_S", 0.05)
    with pytest.raises(InvalidPrompt, match=r"took longer than 0\.05 s"):
        rendered(template)


def test_a_template_cannot_move_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "TIME_LIMIT_S", 0.05)
    with pytest.raises(InvalidPrompt, match="took longer"):
        rendered(
            "{% set deadline = 1e9 %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
        )
