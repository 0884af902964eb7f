"""The chat template in a model's file: found, compiled, tried out."""

from __future__ import annotations

from engines.errors import InvalidPrompt
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
    controls = [token for token in range(native.n_vocab) if native.is_control(token)]
    template = ChatTemplate(
        source,
        bos=text_of(native, native.bos),
        eos=text_of(native, native.eos),
        unk=text_of(native, next(filter(native.is_unknown, controls), -1)),
        controls=[text_of(native, token) for token in controls],
    )
    template.try_out()
    return template


def text_of(native: NativeModel, token: int) -> str:
    """What spells a token; nothing for -1, which is none."""
    return native.piece(token, special=True).decode("utf-8", "replace") if token >= 0 else ""


def reason(error: InvalidPrompt) -> str:
    """One line for the log: that conversations cannot work, and why."""
    why = str(error) if error.__cause__ is None else f"{error} ({error.__cause__})"
    return f"conversations will be refused, only prompts work: {' '.join(why.split())}"
