"""Which models mark their reasoning how, as their chat templates and vocabularies tell."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from engines.llamacpp.block_channels import Blocks
from engines.llamacpp.channels import Style
from engines.llamacpp.message_channels import Messages


def _block(opening: str, closing: str, *answer: tuple[str, str]) -> Blocks:
    """Markers of which the vocabulary has tokens, and those that may be around the answer."""
    openings, closings = tuple(pair[0] for pair in answer), tuple(pair[1] for pair in answer)
    return Blocks(opening, closing, answer_openings=openings, answer_closings=closings, tokens=(opening, closing))


_MESSAGES: Final = (
    Messages(  # gpt-oss
        starts=("<|start|>", "<|channel|>"),
        header=("<|start|>", "<|channel|>", "<|message|>", "to="),
        bodies=("<|message|>",),
        thinks=re.compile(r"<\|channel\|>\s*analysis(?:(?!<\|channel\|>).)*\Z", re.DOTALL),
        ends=("<|end|>",),
        signs=("<|channel|>", "<|message|>"),
        tokens=("<|channel|>", "<|message|>", "<|start|>", "<|end|>"),
    ),
    Messages(  # Muse Glimmer
        starts=("<|start|>",),
        header=("<|start|>", "<|message|>", "to="),
        bodies=("<|message|>",),
        thinks=re.compile(r"\bto=self\s*<\|message\|>\Z"),
        ends=("<|eom|>", "<|eot|>"),
        signs=("to=self<|message|>", "<|eom|>"),
        tokens=("<|message|>", "<|start|>", "<|eom|>", "<|eot|>"),
    ),
    Messages(  # Solar
        starts=("<|begin|>",),
        header=("<|begin|>", "<|think|>", "<|content|>"),
        bodies=("<|think|>", "<|content|>"),
        thinks=re.compile(r"<\|think\|>\Z"),
        ends=("<|end|>",),
        signs=("<|begin|>", "<|think|>", "<|content|>"),
        tokens=("<|begin|>", "<|think|>", "<|content|>", "<|end|>"),
    ),
)
_SPECIAL: Final = (
    Blocks(  # Kimi K3
        "<|open|>think<|sep|>",
        "<|close|>think<|sep|>",
        answer_openings=("<|open|>response<|sep|>",),
        answer_closings=("<|close|>response<|sep|>", "<|close|>message<|sep|>"),
        signs=("<|open|>", "<|close|>", "<|sep|>", "think", "response"),
        tokens=("<|open|>", "<|close|>", "<|sep|>"),
    ),
    Blocks(  # Apriel
        "Here are my reasoning steps:",
        "[BEGIN FINAL RESPONSE]",
        opened=True,
        answer_closings=("[END FINAL RESPONSE]",),
        signs=("[BEGIN FINAL RESPONSE]",),
        tokens=("[BEGIN FINAL RESPONSE]", "[END FINAL RESPONSE]"),
    ),
    Blocks(  # Granite
        "<think>",
        "</think>",
        answer_openings=("<response>",),
        answer_closings=("</response>",),
        signs=("<think>", "</think>", "<response>", "</response>"),
        tokens=("<think>", "</think>", "<response>", "</response>"),
    ),
)
_BLOCKS: Final = (
    replace(_block("<|channel>thought", "<channel|>"), tokens=("<|channel>", "<channel|>")),  # Gemma 4
    _block("<think:opensource>", "</think:opensource>"),  # Hunyuan 3, whose template puts the name together
    _block("<think>", "</think>"),  # Qwen, DeepSeek, GLM, and most others
    _block("[THINK]", "[/THINK]"),  # Mistral
    _block(
        "<|START_THINKING|>",
        "<|END_THINKING|>",
        ("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
        ("<|START_TEXT|>", "<|END_TEXT|>"),
    ),  # Command
    _block("<seed:think>", "</seed:think>"),
    _block("<mm:think>", "</mm:think>"),  # MiniMax
    _block("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
)


def find_style(template: str, *, is_token: Callable[[str], bool]) -> Style | None:
    """How a model marks its reasoning, None if it does not or if its way is not known.

    Args:
        template: The source of its chat template; may be empty.
        is_token: Whether a text is a token of its own in its vocabulary, which text is never made into.
    """
    special = (*_MESSAGES, *_SPECIAL)
    found: Style | None = next((style for style in special if all(sign in template for sign in style.signs)), None)
    found = found or next((style for style in _BLOCKS if style.closing in template), None)
    found = found or next((style for style in _BLOCKS if all(map(is_token, style.tokens))), None)
    if found is None or all(map(is_token, found.tokens)):
        return found
    return replace(found, tokens=())
