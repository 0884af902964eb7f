"""Greedy output equals that of llama-cpp-python's own high-level class, token for token.

Flash attention rounds differently, so both must have it or neither: if only one has, 11 of the 20 answers of SmolLM2
differ somewhere in 32 tokens. The high-level class has it off unless told; llama.cpp's ``auto``, ours, turns it on.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Literal

import llama_cpp
import pytest

from engines.api import DeviceSpec, ModelSpec
from engines.llamacpp.model import LlamaModel
from engines.llamacpp.outputs import Written
from tests.engines.support import run, sequence, tokens_of

CTX, BATCH, TOKENS = 512, 256, 32

QUESTIONS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "Q: Why is the sky blue?\nA:",
    "def fibonacci(n):\n",
    "Name three rivers.",
    "1, 1, 2, 3, 5, 8,",
    "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>system\nYou are terse.<|im_end|>\n<|im_start|>user\nWhat is rain?<|im_end|>\n<|im_start|>assistant\n",
    "Die Hauptstadt von Deutschland ist",
    "日本の首都は",
    "The 🙂 emoji means",
    '{"name": "Ada", "age":',
    "SELECT name FROM",
    "Dear Sir or Madam,\n\nI am writing to",
    "To be, or not to be,",
    "Water boils at",
    "The three laws of motion are:\n1.",
    "My favourite food is",
    "x = 3\ny = 4\nx * y =",
    "   leading spaces and\ttabs\n\n\n",
]


def reference_tokens(llama: llama_cpp.Llama, prompt: list[int]) -> list[int]:
    """Greedy, with the end-of-generation token if there is one."""
    vocab = llama_cpp.llama_model_get_vocab(llama.model)
    tokens: list[int] = []
    for token in llama.generate(prompt, temp=0.0):
        tokens.append(token)
        if len(tokens) == TOKENS or llama_cpp.llama_vocab_is_eog(vocab, token):
            break
    return tokens


def our_tokens(model: LlamaModel, prompt: list[int], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    tokens: list[int] = []
    accept = model._outputs._accept

    def noted(one: Written, token: int) -> None:
        tokens.append(token)
        accept(one, token)

    with monkeypatch.context() as patch:
        patch.setattr(model._outputs, "_accept", noted)
        run(model, sequence(prompt, TOKENS))
    return tokens


def differing(
    path: Path, texts: list[str], *, flash_attn: Literal["auto", "off"], monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """The prompts that are continued otherwise than by the reference."""
    spec = ModelSpec(path, slots=2, ctx=CTX, batch=BATCH, flash_attn=flash_attn, speculate=False)
    with contextlib.closing(LlamaModel(spec, DeviceSpec("cpu", threads=1))) as model:
        prompts = [list(tokens_of(path, text)) for text in texts]
        ours = [our_tokens(model, prompt, monkeypatch) for prompt in prompts]
    reference = llama_cpp.Llama(
        str(path), n_ctx=CTX, n_batch=BATCH, n_threads=1, n_threads_batch=1, flash_attn=flash_attn == "auto"
    )
    with contextlib.closing(reference):
        assert [reference.tokenize(text.encode(), add_bos=True, special=True) for text in texts] == prompts
        theirs = [reference_tokens(reference, prompt) for prompt in prompts]
    return [text for text, a, b in zip(texts, ours, theirs, strict=True) if a != b]


@pytest.mark.parametrize("flash_attn", ["off", "auto"])
def test_a_tiny_model_continues_twenty_prompts_alike(
    flash_attn: Literal["off", "auto"], tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert differing(tiny_model_path, QUESTIONS, flash_attn=flash_attn, monkeypatch=monkeypatch) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_smollm2_continues_twenty_prompts_alike(smollm2_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert differing(smollm2_path, QUESTIONS, flash_attn="off", monkeypatch=monkeypatch) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_smollm2_continues_prompts_alike_with_flash_attention(
    smollm2_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert differing(smollm2_path, QUESTIONS[:6], flash_attn="auto", monkeypatch=monkeypatch) == []
