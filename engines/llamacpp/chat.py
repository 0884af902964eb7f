"""Conversations to prompts by the model's own Jinja template, which is untrusted code in an untrusted file."""

from __future__ import annotations

import secrets
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import jinja2
from jinja2 import nodes

from engines.api import NO_ARGUMENTS, TemplateArgument
from engines.errors import InvalidPrompt
from engines.llamacpp import template_globals
from engines.llamacpp.marks import ControlTexts
from engines.llamacpp.sandbox import METER, Sandbox
from engines.llamacpp.template_meter import Meter

MAX_CHARS = 16 * 2**20
"""Longest prompt a template may write, in characters."""

HEAD_CHARS = 256
"""How much of a prompt tells how a reply begins."""

TIME_LIMIT_S = 2.0
"""Processor time that a template may take."""

_USER_PROBE, _SYSTEM_PROBE = "What is asked", "What is ordered"
_TRIMMED = "You have access to the following functions in JSONSchema format"
_BLANKS = string.whitespace + "\N{LOWER ONE EIGHTH BLOCK}"  # the last one is how SentencePiece writes a space
_BLANK = "\x0b"  # one that no template writes itself


@dataclass(frozen=True)
class Prompt:
    """A conversation as the model reads it.

    Attributes:
        text: All of it.
        cuts: Places where it is to be cut, so that what users wrote stays text; found as they are asked for, once.
        head: The end of what the template wrote before the reply that the model is to write or to continue; where users
            wrote what could mark that, it has other characters.
        continued: What the reply already says.
    """

    text: str
    cuts: Iterator[int]
    head: str = ""
    continued: str = ""


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: Jinja, as in the GGUF's ``tokenizer.chat_template``.
        bos: Text of the beginning-of-sequence token.
        eos: Text of the end-of-sequence token.
        unk: Text of the token for what is unknown.
        controls: Text of every token that no message may spell.
        others: Text of those that it may, unless the template writes them itself: then they are control tokens too,
            whatever the file says they are. Runs of blanks never are: every template writes some, and every user.

    Raises:
        InvalidPrompt: The template cannot be compiled; its cause is why.
    """

    def __init__(
        self, source: str, *, bos: str, eos: str, unk: str = "", controls: Iterable[str], others: Iterable[str] = ()
    ) -> None:
        environment = Sandbox()
        environment.globals.update(template_globals.constants(bos=bos, eos=eos, unk=unk))
        self._takes_system = True
        self._takes_parts = False
        self._wants_trimmed = _TRIMMED in source  # StepFun's: blanks left over make it think in circles
        self._always = frozenset(controls)
        self._others = frozenset(text for text in others if text.strip(_BLANKS))
        self._written = source
        self._controls = self._control_texts()
        try:
            self._looked_for = _looked_for(environment, source)
            self._template = environment.compiled(source)
        except Exception as error:  # of Jinja, or of Python's compiler that it hands the template to
            raise InvalidPrompt("the model's chat template cannot be used; send prompt instead") from error

    def _control_texts(self) -> ControlTexts:
        return ControlTexts([*self._always, *(text for text in self._others if text in self._written)])

    def try_out(self) -> None:
        """Find out what the template takes, with a conversation of one message and one of two; before it is used.

        Raises:
            InvalidPrompt: It writes no conversation, so that none can work.
        """
        user = [{"role": "user", "content": _USER_PROBE}]
        both = [{"role": "system", "content": _SYSTEM_PROBE}, *user]
        if not self._writes(_USER_PROBE, user):
            self._takes_parts = True
            if not self._writes(_USER_PROBE, user):
                self._takes_parts = False
                if not self._writes(_USER_PROBE, both):
                    self.render(user)
                    raise InvalidPrompt("the model's chat template leaves out what the user says; send prompt instead")
        self._takes_system = self._writes(_SYSTEM_PROBE, both)
        self._writes(_USER_PROBE, [*user, {"role": "assistant", "content": "x"}, *user])
        self._controls = self._control_texts()

    def render(
        self, messages: Sequence[Mapping[str, str]], *, arguments: Mapping[str, TemplateArgument] = NO_ARGUMENTS
    ) -> Prompt:
        """The prompt, ready for the assistant's reply, or for more of it where the last message is the assistant's.

        Args:
            messages: Each with ``role`` and ``content``.
            arguments: Variables for the template.

        Raises:
            InvalidPrompt: The template refuses the conversation, or fails on it; then its cause is why.
        """
        for name in arguments.keys() & template_globals.RESERVED:
            raise InvalidPrompt(f"chat_template_kwargs: {name} is set by the server; leave it out")
        if not self._takes_system:
            messages = _without_system(messages)
        texts = {name: value for name, value in arguments.items() if isinstance(value, str)}
        contents = [message["content"].strip() if self._wants_trimmed else message["content"] for message in messages]
        plain = [self._looked_for if message["role"] == "assistant" else frozenset[str]() for message in messages]
        marked, marks = self._controls.marked(
            [*contents, *texts.values()], plain=[*plain, *[frozenset[str]()] * len(texts)]
        )
        contents, values = marked[: len(messages)], marked[len(messages) :]
        end, written = None, ""
        if messages and messages[-1]["role"] == "assistant":
            end, written = secrets.token_hex(16), contents[-1]
            contents[-1] += end + _BLANK
        rendered = self._write(
            {
                **template_globals.defaults(),
                **arguments,
                **dict(zip(texts, values, strict=True)),
                "messages": [
                    {
                        "role": message["role"],
                        "content": [{"type": "text", "text": content}] if self._takes_parts else content,
                    }
                    for message, content in zip(messages, contents, strict=True)
                ],
                "add_generation_prompt": end is None,
            }
        )
        if end is not None:
            rendered = _before(end, rendered)
        text = marks.taken_from(rendered)
        head = rendered if end is None else _without(written, rendered)
        continued = "" if end is None else messages[-1]["content"]
        return Prompt(text, self._controls.cuts(rendered, text), head[-HEAD_CHARS:], continued)

    def _writes(self, probe: str, messages: Sequence[Mapping[str, str]]) -> bool:
        try:
            text = self.render(messages).text
        except InvalidPrompt:
            return False
        self._written += text
        return probe in text

    def _write(self, variables: Mapping[str, object]) -> str:
        parts: list[str] = []
        size = 0
        try:
            for text in self._template.generate({**variables, METER: Meter(TIME_LIMIT_S)}):
                parts.append(text)
                size += len(text)
                if size > MAX_CHARS:
                    raise InvalidPrompt(
                        f"the model's chat template wrote over {MAX_CHARS} characters; send prompt instead"
                    )
        except InvalidPrompt:
            raise
        except template_globals.Refusal as refusal:
            raise InvalidPrompt(f"the model's chat template rejects these messages: {refusal}") from None
        except Exception as error:  # the template is a stranger's program: it may raise anything
            raise InvalidPrompt("the model's chat template fails on these messages; send prompt instead") from error
        return "".join(parts)


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


def _without_system(messages: Sequence[Mapping[str, str]]) -> Sequence[Mapping[str, str]]:
    """The conversation with its system message at the beginning of the one behind it, as llama-server does."""
    if not messages or messages[0]["role"] != "system":
        return messages
    if len(messages) == 1:
        return [{"role": "user", "content": messages[0]["content"]}]
    first = {"role": messages[1]["role"], "content": f"{messages[0]['content']}\n{messages[1]['content']}"}
    return [first, *messages[2:]]


def _before(mark: str, text: str) -> str:
    """What a template wrote up to the end of the last message, which ended with the mark and a blank.

    Where the blank is gone the template trims its messages, and the blanks before the mark would be gone too.
    """
    text, found, rest = text.rpartition(mark)
    if not found:
        raise InvalidPrompt(
            "the model's chat template leaves out the end of the last message, so it cannot be continued; "
            "end with a message of the user"
        )
    return text if rest.startswith(_BLANK) else text.rstrip()


def _without(written: str, text: str) -> str:
    """What a template wrote before the last message; nothing where it has changed that."""
    for ending in (written, written.rstrip(), written.strip()):
        if text.endswith(ending):
            return text[: len(text) - len(ending)]
    return ""
