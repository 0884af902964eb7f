"""Conversations to prompts by the model's own Jinja template, which is untrusted code in an untrusted file."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import jinja2
from jinja2 import nodes

from engines.errors import InvalidPrompt
from engines.llamacpp.marks import ControlTexts
from engines.llamacpp.sandbox import DEADLINE, Deadline, Sandbox

MAX_CHARS = 16 * 2**20
"""Longest prompt a template may write, in characters."""

TIME_LIMIT_S = 2.0
"""Processor time that a template may take."""

SAMPLE_LIMIT_S = 0.1
"""The same where it writes three short conversations, to show what it writes."""

MAX_REFUSAL_CHARS = 300
"""Longest sentence of a template's own that is passed on."""


@dataclass(frozen=True)
class Prompt:
    """A conversation as the model reads it.

    Attributes:
        text: All of it.
        cuts: Places where it is to be cut, so that what users wrote stays text; found as they are asked for, once.
    """

    text: str
    cuts: Iterator[int]


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: Jinja, as in the GGUF's ``tokenizer.chat_template``.
        bos: Text of the beginning-of-sequence token.
        eos: Text of the end-of-sequence token.
        controls: Text of every token that no message may spell.
        others: Text of those that it may, unless the template writes them itself: then they are control tokens too,
            whatever the file says they are.

    Raises:
        InvalidPrompt: The template cannot be compiled; its cause is why.
    """

    def __init__(self, source: str, *, bos: str, eos: str, controls: Iterable[str], others: Iterable[str] = ()) -> None:
        environment = Sandbox()
        environment.globals.update(
            raise_exception=_raise_exception,
            strftime_now=lambda form: datetime.datetime.now().strftime(form),  # the template wants local time
            bos_token=bos,
            eos_token=eos,
        )
        self._controls = ControlTexts(())
        try:
            self._looked_for = _looked_for(environment, source)
            self._template = environment.compiled(source)
        except Exception as error:  # of Jinja, or of Python's compiler that it hands the template to
            raise InvalidPrompt("the model's chat template cannot be used; send prompt instead") from error
        written = source + self._sample()
        self._controls = ControlTexts([*controls, *(text for text in others if text in written)])

    def _sample(self) -> str:
        """What it writes around messages; a part of it may be in no single text of its source."""
        written = ""
        for roles in (["user"], ["system", "user", "assistant", "user"], ["user", "assistant", "user"]):
            messages = [{"role": role, "content": "x"} for role in roles]
            try:
                written += self.render(messages, time_limit_s=SAMPLE_LIMIT_S).text
            except InvalidPrompt as error:
                if error.__cause__ is not None or roles == ["user"]:
                    break  # it does not only refuse these roles
        return written

    def render(self, messages: Sequence[Mapping[str, str]], *, time_limit_s: float | None = None) -> Prompt:
        """The prompt, ready for the assistant's reply.

        Raises:
            InvalidPrompt: The template refuses the conversation, or fails on it; then its cause is why.
        """
        plain = [self._looked_for if message["role"] == "assistant" else frozenset[str]() for message in messages]
        contents, marks = self._controls.marked([message["content"] for message in messages], plain=plain)
        safe = [{**message, "content": content} for message, content in zip(messages, contents, strict=True)]
        parts: list[str] = []
        size = 0
        variables = {"messages": safe, "add_generation_prompt": True, DEADLINE: Deadline(time_limit_s or TIME_LIMIT_S)}
        try:
            for text in self._template.generate(variables):
                parts.append(text)
                size += len(text)
                if size > MAX_CHARS:
                    raise InvalidPrompt(f"the model's chat template wrote more than {MAX_CHARS} characters")
        except InvalidPrompt:
            raise
        except _Refusal as refusal:
            raise InvalidPrompt(f"the model's chat template refuses these messages: {refusal}") from None
        except Exception as error:  # the template is a stranger's program: it may raise anything
            raise InvalidPrompt("the model's chat template fails on these messages; send prompt instead") from error
        rendered = "".join(parts)
        text = marks.taken_from(rendered)
        return Prompt(text, self._controls.cuts(rendered, text))


def _looked_for(environment: jinja2.Environment, source: str) -> frozenset[str]:
    """Texts that a template looks for in others, such as ``</think>``: in comparisons and as arguments of methods.

    In an assistant's message these stay as the model wrote them.
    """
    tree = environment.parse(source)
    found: set[str] = set()
    for node in tree.find_all((nodes.Compare, nodes.Call, nodes.Filter)):
        if isinstance(node, nodes.Call) and not isinstance(node.node, nodes.Getattr):
            continue  # not a method
        found.update(one.value for one in node.find_all(nodes.Const) if isinstance(one.value, str))
    return frozenset(found)


class _Refusal(jinja2.TemplateError):
    """What a template says to those whose messages it does not take."""


def _raise_exception(message: object) -> NoReturn:
    raise _Refusal(" ".join(str(message)[:MAX_REFUSAL_CHARS].split()))
