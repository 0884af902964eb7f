"""The chat template in a model's file: found, compiled, tried out; and what it tells of how the model reasons."""

from __future__ import annotations

from engines.errors import InvalidPrompt
from engines.llamacpp.channels import Style, find_style
from engines.llamacpp.chat import ChatTemplate
from engines.llamacpp.native.model import NativeModel


def open_template(native: NativeModel) -> ChatTemplate:
    """The template, for a vocabulary that is there to stay or one that is only looked at.

    Raises:
        InvalidPrompt: The model has none, or none that can work.
    """
    source = native.chat_template
    if source is None:
        raise InvalidPrompt(f"{native.name} has no chat template; send prompt instead of messages")
    controls = sorted({*native.controls, *native.ends})
    template = ChatTemplate(
        source,
        bos=native.text(native.bos),
        eos=native.text(native.eos),
        unk=native.text(next(filter(native.is_unknown, controls), -1)),
        controls=map(native.text, controls),
        others=map(native.text, native.specials),
    )
    template.try_out()
    return template


def reasoning_style(native: NativeModel) -> Style | None:
    """How the model marks its reasoning; None where that is not known."""
    return find_style(native.chat_template or "", is_token=native.has_token)


def reason(error: InvalidPrompt) -> str:
    """One line for the log: that conversations cannot work, and why."""
    why = str(error) if error.__cause__ is None else f"{error} ({error.__cause__})"
    return f"conversations will be refused, only prompts work: {' '.join(why.split())}"
