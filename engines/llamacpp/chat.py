"""Conversations to prompts by the model's own Jinja template, which is untrusted code in an untrusted file."""

from __future__ import annotations

import itertools
import secrets
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence

from engines.api import NO_ARGUMENTS, TemplateArgument
from engines.errors import InvalidPrompt
from engines.llamacpp import template_globals
from engines.llamacpp.sandbox import METER, Sandbox
from engines.llamacpp.spelling import Spellings
from engines.llamacpp.template_meter import Meter

MAX_CHARS = 16 * 2**20
"""Longest prompt a template may write, in characters."""

TIME_LIMIT_S = 2.0
"""Processor time that a template may take."""

SEAM = "\ue0fe"
"""Private-use character: the text must be tokenised separately on its two sides."""

_USER_PROBE, _SYSTEM_PROBE = "What is asked", "What is ordered"
_TRIMMED = "You have access to the following functions in JSONSchema format"
_BLANK = "\x0b"  # one that no template writes itself


class ControlTexts:
    """Splits user text so that no part of it can be read as a control token.

    A template writes its own control tokens and the users' text into one string. Wherever the users' text spells a
    control token, or begins or ends in a way that could complete one together with the template's text, a `SEAM` is put
    in; what lies on two sides of a seam is tokenised separately, so the spelling stays text.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._spellings = Spellings(texts)
        self._heads = frozenset(text[:n] for text in self._spellings.texts for n in range(1, len(text)))
        self._tails = frozenset(text[n:] for text in self._spellings.texts for n in range(1, len(text)))

    def defuse(self, content: str) -> str:
        """The content with a seam in every place that may need one. Seams that were there before are dropped."""
        content = content.replace(SEAM, "")
        cuts = {start + 1 for start, _ in self._spellings.within(content)}
        core = content.strip()  # templates like to trim
        left = content.find(core)
        right = left + len(core)
        sizes = range(1, min(max(self._spellings.lengths, default=0), len(core) + 1))
        if any(core[:n] in self._tails for n in sizes):
            cuts.add(left)
        if any(core[-n:] in self._heads for n in sizes):
            cuts.add(right)
        edges = [0, *sorted(cuts), len(content)]
        return SEAM.join(content[a:b] for a, b in itertools.pairwise(edges))

    def split(self, rendered: str) -> list[str]:
        """The parts between seams, of those that do keep a control text apart.

        The others are closed, because a word's tokens can depend on what stands beside it.
        """
        pieces = rendered.split(SEAM)
        text = "".join(pieces)
        seams = list(itertools.accumulate(len(piece) for piece in pieces[:-1]))
        needed: set[int] = set()
        for start, end in self._spellings.within(text) if seams else ():
            needed.update(seams[bisect_right(seams, start) : bisect_left(seams, end)])
        return [text[a:b] for a, b in itertools.pairwise([0, *sorted(needed), len(text)])]


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: Jinja, as in the GGUF's ``tokenizer.chat_template``.
        bos: Text of the beginning-of-sequence token.
        eos: Text of the end-of-sequence token.
        unk: Text of the token for what is unknown.
        controls: Text of every control token.

    Raises:
        InvalidPrompt: The template cannot be compiled; its cause is why.
    """

    def __init__(self, source: str, *, bos: str, eos: str, unk: str = "", controls: Iterable[str]) -> None:
        environment = Sandbox()
        environment.globals.update(template_globals.constants(bos=bos, eos=eos, unk=unk))
        self._controls = ControlTexts(controls)
        self._takes_system = True
        self._takes_parts = False
        self._wants_trimmed = _TRIMMED in source  # StepFun's: blanks left over make it think in circles
        try:
            self._template = environment.compiled(source)
        except Exception as error:  # of Jinja, or of Python's compiler that it hands the template to
            raise InvalidPrompt("the model's chat template cannot be used; send prompt instead") from error

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

    def render(
        self, messages: Sequence[Mapping[str, str]], *, arguments: Mapping[str, TemplateArgument] = NO_ARGUMENTS
    ) -> list[str]:
        """The prompt in parts that are to be tokenised one by one.

        It is ready for the assistant's reply, or for more of it where the last message is the assistant's.

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
        contents = [message["content"].strip() if self._wants_trimmed else message["content"] for message in messages]
        contents = [self._controls.defuse(content) for content in contents]
        mark = None
        if messages and messages[-1]["role"] == "assistant":
            mark = secrets.token_hex(16)
            contents[-1] += mark + _BLANK
        text = self._written(
            {
                **template_globals.defaults(),
                **{
                    name: self._controls.defuse(value) if isinstance(value, str) else value
                    for name, value in arguments.items()
                },
                "messages": [
                    {
                        "role": message["role"],
                        "content": [{"type": "text", "text": content}] if self._takes_parts else content,
                    }
                    for message, content in zip(messages, contents, strict=True)
                ],
                "add_generation_prompt": mark is None,
            }
        )
        return self._controls.split(text if mark is None else _before(mark, text))

    def _writes(self, probe: str, messages: Sequence[Mapping[str, str]]) -> bool:
        try:
            return probe in "".join(self.render(messages))
        except InvalidPrompt:
            return False

    def _written(self, variables: Mapping[str, object]) -> str:
        parts: list[str] = []
        size = 0
        try:
            for text in self._template.generate({**variables, METER: Meter(TIME_LIMIT_S)}):
                parts.append(text)
                size += len(text)
                if size > MAX_CHARS:
                    raise InvalidPrompt(f"the model's chat template wrote more than {MAX_CHARS} characters")
        except InvalidPrompt:
            raise
        except template_globals.Refusal as refusal:
            raise InvalidPrompt(f"the model's chat template refuses these messages: {refusal}") from None
        except Exception as error:  # the template is a stranger's program: it may raise anything
            raise InvalidPrompt("the model's chat template fails on these messages; send prompt instead") from error
        return "".join(parts)


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
