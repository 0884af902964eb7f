"""A chat template is a stranger's program inside a stranger's file: what it may take is bounded."""

from __future__ import annotations

import resource
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from engines.errors import InvalidPrompt
from engines.llamacpp import template_sizes
from engines.llamacpp.chat import ChatTemplate
from engines.llamacpp.template_meter import Meter
from testkit.harness import serving
from testkit.tiny_gguf import CHATML, write_tiny_llama
from tests.http.envelope import assert_envelope


def rendered(template: str, content: str = "Hello") -> str:
    compiled = ChatTemplate(template, bos="<s>", eos="</s>", controls=["<|im_end|>"])
    return compiled.render([{"role": "user", "content": content}]).text


def again(step: str, first: str = "[1]") -> str:
    """A template that makes ``n.x`` anew 99 times."""
    return f"{{% set n = namespace(x={first}) %}}{{% for i in range(99) %}}{{% set n.x = {step} %}}{{% endfor %}}"


TWINS = (  # what is equal and not the same, and takes as many comparisons as there are boxes
    "{% set n = namespace(x=[1], y=[1]) %}{% for i in range(99) %}"
    "{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}{% endfor %}"
)

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
    "boxes compared": TWINS + "{{ n.x == n.y }}",
    "boxes looked for": TWINS + "{{ n.x in [n.y] }}",
    "boxes tested": TWINS + "{{ n.x is eq(n.y) }}",
    "boxes sorted out": TWINS + "{{ [n.x, n.y] | select('eq', n.y) | list | length }}",
    "boxes counted": TWINS + "{{ [n.x].count(n.y) }}",
    "boxes that change": "{% for i in [0] %}" + TWINS + "{{ loop.changed(n.x) }}{{ loop.changed(n.y) }}{% endfor %}",
    "boxes as keys": again("(n.x, n.x)", first="(1, 1)") + "{{ {n.x: 1} | length }}",
    "boxes as a key": again("(n.x, n.x)", first="(1, 1)") + "{{ {}[n.x] }}{{ {}.get(n.x) }}",
    "boxes, each once": again("(n.x, n.x)", first="(1, 1)") + "{{ [n.x, n.x] | unique | list | length }}",
    "boxes with names": "{% set n = namespace(x=1) %}{% for i in range(99) %}{% set m = namespace(a=n.x, b=n.x) %}"
    "{% set n.x = m %}{% endfor %}{{ n.x }}",
    "bytes": "{{ 'x'.encode().ljust(10 ** 10) | length }}",
    "a number's bytes": "{{ (1).to_bytes(10 ** 10, 'big') | length }}",
    "a rounding": "{{ 5 | round(-(10 ** 9)) }}",
    "a rounding up": "{{ 1 | round(10 ** 9, 'ceil') }}",
    "a sum of lists": "{{ ([range(10) | list] * 90000) | sum(start=[]) | length }}",
    "a table of replacements": "{{ ('x' * 99999).translate({120: 'y' * 99999}) }}",
    "a page's text": "{{ ('<!---->' * 2000000) | striptags | length }}",
    "a page's links": "{{ ('www.a.b ' * 1000000) | urlize | length }}",
    "a title": "{{ ('a-' * 8000000) | title | length }}",
    "characters": "{{ ('\u6f22' * 8000000) | list | length }}",
    "characters, chosen": "{{ ('\u6f22' * 8000000) | select | list | length }}",
    "words": "{{ ('ab ' * 5000000).split() | length }}",
    "lines": "{{ ('a\n' * 5000000).splitlines() | length }}",
    "a width of widths": "{{ '{:{}{}{}{}}'.format(1, 9999, 9999, 99, 9) }}",
    "JSON of many lines": "{{ (range(99999) | list * 9) | tojson(indent=1) | length }}",
    "a date's format": "{{ strftime_now('%c' * 999999) }}",
    "a path": "{{ ['x'] | map(attribute='0.' * 4000000) | list }}",
    "a path to sort by": "{{ ['x', 'y'] | sort(attribute='0.' * 4000000) | list }}",
    "a search from the end": "{{ ('a' * 8000000).rfind('ab' + 'a' * 20000) }}",
    "pieces from the end": "{{ ('a' * 8000000).rsplit('ab' + 'a' * 20000) | length }}",
    "a search for blanks": "{{ ('b' * 8000000).strip('a' * 8000000 + 'b') }}",
    "a trim": "{{ ('b' * 8000000) | trim('a' * 8000000 + 'b') }}",
    "many fields": "{{ ('{0}' * 3000000).format('x') | length }}",
    "a digit string": "{{ ('9' * 9999999) | int }}",
}


def taken(template: str) -> tuple[float, float]:
    """Seconds of processor time, and MiB beyond what this process ever had, until the template is refused."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.thread_time()
    with pytest.raises(InvalidPrompt):
        rendered(template)
    return time.thread_time() - began, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


@pytest.mark.parametrize("template", TOO_MUCH.values(), ids=TOO_MUCH)
def test_no_single_operation_takes_all_memory(template: str) -> None:
    seconds, mib = taken(template)
    assert seconds < 2.7
    assert mib < 400


BIG = "'x' * 10 ** 7"
KEPT = {
    "texts in a list": again(f"[n.x, {BIG}]"),
    "texts in a tuple": again(f"(n.x, {BIG})"),
    "texts in a dict": again(f"{{'a': n.x, 'b': {BIG}}}"),
    "texts in namespaces": "{% set n = namespace(x=1) %}{% for i in range(99) %}"
    f"{{% set m = namespace(a=n.x, b={BIG}) %}}{{% set n.x = m %}}{{% endfor %}}",
    "slices": f"{{% set b = {BIG} %}}" + again("[n.x, b[1:]]"),
    "capitals": f"{{% set b = {BIG} %}}" + again("[n.x, b.upper()]"),
    "capitals by filter": f"{{% set b = {BIG} %}}" + again("[n.x, b | upper]"),
    "lists": again("[n.x, range(99999) | list, range(99998) | list, range(99997) | list]"),
    "texts that grow while others hold them": f"{{% set n = namespace(x={BIG}, l=[]) %}}{{% for i in range(99) %}}"
    "{% set n.l = [n.l, n.x] %}{% set n.x = n.x ~ 'y' %}{% endfor %}",
    "variables": "".join(f"{{% set v{i} = {BIG} %}}" for i in range(99)),
    "a macro's text": "{% macro f() %}{% for a in range(99999) %}" + "x" * 9999 + "{% endfor %}{% endmacro %}{{ f() }}",
    "a variable's text": "{% set v %}{% for a in range(99999) %}" + "x" * 9999 + "{% endfor %}{% endset %}",
    "a block's text": "{% if false %}{% block b %}{% for a in range(99999) %}"
    + "x" * 9999
    + "{% endfor %}{% endblock %}"
    "{% endif %}{% set v = self.b() %}",
    "macros of macros": "{% macro f(n) %}xxxxxxxx{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{% set n = namespace(x=1) %}{% for i in range(99) %}{% set n.x = [n.x, f(15)] %}{% endfor %}",
    "cyclers": again("[n.x, cycler(*range(99999))]"),
    "arguments": "{% set n = namespace(x=1) %}{% macro f() %}{% set n.x = [n.x, varargs] %}{% endmacro %}"
    "{% for i in range(9999) %}{{ f(*range(99999)) }}{% endfor %}",
    "small boxes": "{% set n = namespace(x=1) %}{% for a in range(99999) %}{% for b in range(99) %}"
    + "{% set n.x = "
    + "[" * 20
    + "n.x"
    + "]" * 20
    + " %}{% endfor %}{% endfor %}",
}


@pytest.mark.parametrize("template", KEPT.values(), ids=KEPT)
def test_what_a_rendering_keeps_is_bounded_too(template: str) -> None:
    """Before what is made was counted, 11 of the first 15 took 880 MiB or more (tried), and more with a longer loop."""
    seconds, mib = taken(template)
    assert seconds < 2.7
    assert mib < 400


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


HONEST = {
    "a replacement": "{% for m in messages %}{% set c = m.content %}{{ c.replace('o', '/') }}{% endfor %}",
    "Nemotron's": "{% for m in messages %}{% set c = m.content | string %}{% set c = c.replace('<think>', '') | trim %}"
    "{{ '<user>' + c + '</user>' }}{% endfor %}",
    "a format": "{% for m in messages %}{{ '[{}] {}'.format(m.role, m.content) }}{% endfor %}",
    "a percent format": "{% for m in messages %}{{ '[%s] %s' % (m.role, m.content) }}{% endfor %}",
    "a join": "{% for m in messages %}{{ ', '.join([m.role, m.content]) }}{{ [m.content] | join('-') }}{% endfor %}",
    "lines": "{% for m in messages %}{{ m.content | indent(4) }}{{ m.content.split('\n') | length }}{% endfor %}",
    "JSON": "{% for m in messages %}{{ m | tojson }}{{ {'a': [m]} | tojson(indent=4) }}{% endfor %}",
    "thoughts cut off": "{% for m in messages %}{{ m.content.split('</think>')[-1].lstrip('\n') }}{% endfor %}",
}


@pytest.mark.parametrize("template", HONEST.values(), ids=HONEST)
def test_long_contents_are_no_flood(template: str) -> None:
    """The bound of each operation is what it makes, whatever variables Jinja passes along in a loop."""
    assert rendered(template, "word\n" * 100_000).count("w") >= 100_000


LINEAR = {
    "the length in each turn": "{% for m in messages %}{% if loop.index < messages | length %},{% endif %}{% endfor %}",
    "the last user's turn, as Qwen 3 looks for it": "{% set ns = namespace(last=messages | length - 1, tool=true) %}"
    "{% for m in messages[::-1] %}{% set i = (messages | length - 1) - loop.index0 %}"
    "{% if ns.tool and m.role == 'user' %}{% set ns.tool = false %}{% set ns.last = i %}{% endif %}{% endfor %}",
    "the speaker before, as Gemma 4 looks for it": "{% for m in messages %}"
    "{% set p = namespace(role=none, found=false) %}"
    "{% for j in range(loop.index0 - 1, -1, -1) %}{% if not p.found %}{% if messages[j]['role'] != 'tool' %}"
    "{% set p.role = messages[j]['role'] %}{% set p.found = true %}{% endif %}{% endif %}{% endfor %}"
    "{% if p.role == m.role %}twice{% endif %}{% endfor %}",
    "all in one variable, as Reka writes it": "{% set ns = namespace(out='') %}{% for m in messages %}"
    "{% set ns.out = ns.out ~ m.role ~ ': ' %}{% set ns.out = ns.out + m.content + '|' %}{% endfor %}{{ ns.out }}",
}


@pytest.mark.parametrize("template", LINEAR.values(), ids=LINEAR)
def test_the_cost_of_many_messages_grows_with_their_number(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in looks at the meter and in items that are measured, which is what it does in each turn."""
    counts: list[int] = []
    measured = template_sizes._looked_at

    def check(self: Meter) -> None:
        counts[-1] += 1

    def looked_at(values: Collection[object], *others: Any) -> Any:
        counts[-1] += len(values)
        return measured(values, *others)

    monkeypatch.setattr(Meter, "check", check)
    monkeypatch.setattr(template_sizes, "_looked_at", looked_at)
    made = ChatTemplate(template, bos="", eos="", controls=[])
    for number in (500, 2000):
        counts.append(0)
        made.render([{"role": "user", "content": "word " * 50}] * number)
    assert counts[1] < 4.5 * counts[0]


def test_a_search_that_ends_early_finds_the_same() -> None:
    """Turns that would do nothing are left out, and only those."""
    template = (
        "{% set n = namespace(found=false, seen='') %}"
        "{% for x in range(9) %}{% if not n.found %}{% set n.seen = n.seen ~ x %}"
        "{% if x == 3 %}{% set n.found = true %}{% endif %}{% endif %}{% endfor %}{{ n.seen }}|"
        "{% for x in range(5) %}{% if not x %}a{% endif %}{% endfor %}|"
        "{% for x in range(5) %}{% if loop.last %}b{% endif %}{% endfor %}|"
        "{% for x in range(3) %}{% if n.found %}{{ x }}{% endif %}{% else %}none{% endfor %}|"
        "{% for x, y in [(0, 1), (1, 0)] %}{% if y %}{{ x }}{% endif %}{% endfor %}|"
        "{% for x in range(3) %}{% if not n.found %}c{% else %}{{ x }}{% endif %}{% endfor %}"
    )
    assert rendered(template) == "0123|a|b|012|0|012"


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
