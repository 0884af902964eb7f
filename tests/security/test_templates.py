"""A chat template is a stranger's program inside a stranger's file: what it may take is bounded."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import pytest

from engines.errors import InvalidPrompt
from engines.llamacpp import template_sizes
from engines.llamacpp.chat import ChatTemplate
from testkit.harness import serving
from testkit.tiny_gguf import CHATML, write_tiny_llama
from tests.http.envelope import assert_envelope


def rendered(template: str, content: str = "Hello") -> str:
    compiled = ChatTemplate(template, bos="<s>", eos="</s>", controls=["<|im_end|>"])
    return "".join(compiled.render([{"role": "user", "content": content}]))


def again(step: str, first: str = "[1]") -> str:
    """A template that makes ``n.x`` anew 99 times."""
    return f"{{% set n = namespace(x={first}) %}}{{% for i in range(99) %}}{{% set n.x = {step} %}}{{% endfor %}}"


TOO_MUCH = {
    "a power": "{{ 9 ** (9 ** 9) }}",
    "powers in turn": again("n.x ** 999", first="7"),
    "products in turn": again("n.x * n.x", first="7"),
    "a text times a number": "{{ 'x' * 10 ** 10 }}",
    "a number times a text": "{{ 10 ** 10 * 'x' }}",
    "a list times a number": "{{ ([0] * 10 ** 10) | length }}",
    "a text that doubles": again("n.x + n.x", first="'x'"),
    "one that joins itself": again("n.x ~ n.x", first="'x'"),
    "a list that doubles": again("n.x + n.x"),
    "boxes in boxes": again("[n.x, n.x]") + "{{ n.x }}",
    "boxes as text": again("[n.x, n.x]") + "{{ n.x | string }}",
    "boxes as JSON": again("{1: n.x, 2: n.x}") + "{{ n.x | tojson }}",
    "a filter's width": "{{ 'x' | center(10 ** 10) }}",
    "a method's width": "{{ 'x'.ljust(10 ** 10) }}",
    "zeros": "{{ 'x'.zfill(10 ** 10) }}",
    "tabs": "{{ '\t'.expandtabs(10 ** 10) }}",
    "a format's width": "{{ '%9999999999d' % 1 }}",
    "a format's star": "{{ '%*d' % (10 ** 10, 1) }}",
    "a format filter": "{{ '%9999999999d' | format(1) }}",
    "a brace format": "{{ '{:9999999999}'.format(1) }}",
    "a brace format's own width": "{{ '{:{}}'.format(1, 10 ** 10) }}",
    "many braces": "{{ ('{0}' * 99999).format('x' * 99999) }}",
    "a replacement": "{{ ('x' * 99999).replace('x', 'y' * 99999) }}",
    "a replacement by filter": "{{ ('x' * 99999) | replace('x', 'y' * 99999) }}",
    "a join": "{{ range(99999) | join('x' * 99999) }}",
    "a join of what is lazy": "{{ range(99999) | map('string') | join('x' * 99999) }}",
    "a join by method": "{{ ('x' * 99999).join(range(99999) | map('string')) }}",
    "an indentation": "{{ ('\n' * 99999) | indent(99999) }}",
    "an indentation of JSON": "{{ range(999) | list | tojson(indent=10 ** 9) }}",
    "a batch": "{{ [1] | batch(10 ** 10, 0) | list | length }}",
    "slices": "{{ [1] | slice(10 ** 10) | list | length }}",
    "a word wrap": "{{ ('x ' * 99999) | wordwrap(1, wrapstring='y' * 99999) }}",
}


@pytest.mark.parametrize("template", TOO_MUCH.values(), ids=TOO_MUCH)
def test_no_single_operation_takes_all_memory(template: str) -> None:
    """Before the sandbox measured operations, 30 of these 32 took over 3 GiB or over 4 s of processor time (tried)."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.thread_time()
    with pytest.raises(InvalidPrompt):
        rendered(template)
    assert time.thread_time() - began < 2.5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


def test_the_generator_of_filler_is_gone() -> None:
    with pytest.raises(InvalidPrompt) as caught:
        rendered("{{ lipsum(n=10 ** 6) }}")
    assert "lipsum" in str(caught.value.__cause__)


HARMLESS = {
    "sums and products": (
        "{{ 2 ** 10 + 3 * 4 }} {{ 7 % 4 }} {{ 1700000000000 }} {{ 3000000000 * 0.5 }}",
        "1036 3 1700000000000 1500000000.0",
    ),
    "a line": ("{{ '-' * 20 }}", "-" * 20),
    "a text and a number": ("{{ 'a' ~ 1 ~ none ~ [1] }}{{ 'b' + 'c' }}", "a1None[1]bc"),
    "formats": ("{{ '%s-%03d' % ('a', 7) }}{{ '{}:{:>5}'.format(1, 'x') }}{{ '%s' | format('y') }}", "a-0071:    xy"),
    "filters": (
        "{{ ' a ' | trim | upper | center(5) }}{{ [1, 2] | join(', ') }}{{ {'a': [1]} | tojson }}",
        '  A  1, 2{"a": [1]}',
    ),
    "lazy filters": (
        "{{ messages | map(attribute='role') | join('/') }}"
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
        "user1",
    ),
    "a replacement": ("{{ messages[0].content.replace('l', 'LL') }}{{ 'a,b'.split(',') | length }}", "HeLLLLo2"),
}


@pytest.mark.parametrize(("template", "text"), HARMLESS.values(), ids=HARMLESS)
def test_what_templates_really_do_goes_on_working(template: str, text: str) -> None:
    assert rendered(template) == text


def test_a_long_conversation_is_no_flood() -> None:
    content = "word " * 200_000
    assert rendered(CHATML, content).count("word ") == 200_000
    assert len(rendered("{{ messages | tojson }}", content)) > 1_000_000


def test_a_limit_is_not_undone_by_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Template code can set any variable but not those that Jinja could not spell."""
    monkeypatch.setattr(template_sizes, "MAX_CHARS", 100)
    with pytest.raises(InvalidPrompt, match="more than 100"):
        rendered("{% set MAX_CHARS = 10 ** 9 %}{{ 'x' * 101 }}")


async def test_a_server_with_such_a_model_refuses_messages_and_serves_prompts(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "bomb.gguf", chat_template="{{ 'x' * 9 ** (9 ** 9) }}")
    async with serving(model) as server:
        answer = await server.post(messages=[{"role": "user", "content": "Hello"}])
        assert "send prompt instead" in assert_envelope(answer, 400, "INVALID_PARAMS")
        assert (await server.run(max_tokens=3))[-1].data["tokens_out"] == 3
