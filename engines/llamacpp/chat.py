"""Conversations to prompts by the model's own Jinja template, which is untrusted code in an untrusted file."""

from __future__ import annotations

import datetime
import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from typing import NoReturn

import jinja2

from engines.errors import InvalidPrompt
from engines.llamacpp.sandbox import DEADLINE, Deadline, Sandbox
from engines.llamacpp.spelling import Spellings

MAX_CHARS = 16 * 2**20
"""Longest prompt a template may write, in characters."""

TIME_LIMIT_S = 2.0
"""Processor time that a template may take."""

MAX_REFUSAL_CHARS = 300
"""Longest sentence of a template's own that is passed on."""

SEAM = "\ue0fe"
"""Private-use character: the text must be tokenised separately on its two sides."""


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
        controls: Text of every control token.

    Raises:
        InvalidPrompt: The template cannot be compiled; its cause is why.
    """

    def __init__(self, source: str, *, bos: str, eos: str, controls: Iterable[str]) -> None:
        environment = Sandbox()
        environment.globals.update(
            raise_exception=_raise_exception,
            strftime_now=lambda form: datetime.datetime.now().strftime(form),  # the template wants local time
            bos_token=bos,
            eos_token=eos,
        )
        self._controls = ControlTexts(controls)
        try:
            self._template = environment.compiled(source)
        except Exception as error:  # of Jinja, or of Python's compiler that it hands the template to
            raise InvalidPrompt("the model's chat template cannot be used; send prompt instead") from error

    def render(self, messages: Sequence[Mapping[str, str]]) -> list[str]:
        """The prompt, ready for the assistant's reply, in parts that are to be tokenised one by one.

        Raises:
            InvalidPrompt: The template refuses the conversation, or fails on it; then its cause is why.
        """
        safe = [{"role": m["role"], "content": self._controls.defuse(m["content"])} for m in messages]
        parts: list[str] = []
        size = 0
        variables = {"messages": safe, "add_generation_prompt": True, DEADLINE: Deadline(TIME_LIMIT_S)}
        try:
            for text in self._template.generate(variables):
                parts.append(text)
                size += len(text)
                if size > MAX_CHARS:
                    raise InvalidPrompt(
                        f"the model's chat template wrote over {MAX_CHARS} characters; send prompt instead"
                    )
        except InvalidPrompt:
            raise
        except _Refusal as refusal:
            raise InvalidPrompt(f"the model's chat template rejects these messages: {refusal}") from None
        except Exception as error:  # the template is a stranger's program: it may raise anything
            raise InvalidPrompt("the model's chat template fails on these messages; send prompt instead") from error
        return self._controls.split("".join(parts))


class _Refusal(jinja2.TemplateError):
    """What a template says to those whose messages it does not take."""


def _raise_exception(message: object) -> NoReturn:
    raise _Refusal(" ".join(str(message)[:MAX_REFUSAL_CHARS].split()))
