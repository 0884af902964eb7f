"""What the other tests take for granted about generated model files, shown on the real llama.cpp."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from numpy.typing import NDArray

from testkit import damaged_gguf, tiny_gguf

PROMPTS = [" ".join([*tiny_gguf.PIECES[10 * n : 11 * n + 1], "and the river"]).replace("▁", "") for n in range(16)]
WRITERS: list[Callable[[Path], Path]] = [
    tiny_gguf.write_tiny_llama,
    tiny_gguf.write_tiny_swa,
    tiny_gguf.write_tiny_mamba,
    tiny_gguf.write_tiny_lfm2,
    tiny_gguf.write_tiny_bert,
]
GENERATING = WRITERS[:4]


@dataclass(frozen=True)
class Opened:
    """A model and a context of one sequence, as llama.cpp's pointers."""

    model: Any
    context: Any

    @property
    def vocab(self) -> Any:
        return llama_cpp.llama_model_get_vocab(self.model)

    @property
    def memory(self) -> Any:
        return llama_cpp.llama_get_memory(self.context)

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        data = text.encode()
        room = (llama_cpp.llama_token * (len(data) + 8))()
        count = llama_cpp.llama_tokenize(self.vocab, data, len(data), room, len(room), True, special)
        return list(room[:count])

    def piece(self, token: int, *, special: bool = False) -> bytes:
        room = ctypes.create_string_buffer(64)
        length = llama_cpp.llama_token_to_piece(self.vocab, token, room, len(room), 0, special)
        return room.raw[:length]

    def text(self, tokens: Sequence[int]) -> str:
        return b"".join(self.piece(token) for token in tokens).decode()

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Of the token after these, which are appended to the context."""
        data = (llama_cpp.llama_token * len(tokens))(*tokens)
        assert llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(data, len(tokens))) == 0
        row = llama_cpp.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(row, (llama_cpp.llama_vocab_n_tokens(self.vocab),)).copy()

    def greedy(self, prompt: str, *, limit: int = 64) -> tuple[list[int], list[float]]:
        """The tokens up to the first that ends generation, and by how much each led the second best."""
        llama_cpp.llama_memory_clear(self.memory, True)
        tokens: list[int] = []
        leads: list[float] = []
        step = self.tokenize(prompt)
        while len(tokens) < limit:
            logits = self.logits(step)
            second, best = np.argsort(logits)[-2:]
            if llama_cpp.llama_vocab_is_eog(self.vocab, int(best)):
                break
            tokens.append(int(best))
            leads.append(float(logits[best] - logits[second]))
            step = [int(best)]
        return tokens, leads


@contextmanager
def opened(path: Path, *, swa_full: bool = True) -> Iterator[Opened]:
    model = llama_cpp.llama_model_load_from_file(os.fsencode(path), llama_cpp.llama_model_default_params())
    assert model, f"llama.cpp does not load {path}"
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_ubatch, params.n_threads, params.n_threads_batch = 512, 64, 1, 1
    params.swa_full = swa_full
    context = llama_cpp.llama_init_from_model(model, params)
    assert context, f"llama.cpp makes no context for {path}"
    try:
        yield Opened(model, context)
    finally:
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("write", WRITERS)
def test_same_arguments_give_the_same_bytes(write: Callable[..., Path], tmp_path: Path) -> None:
    first, again, other = write(tmp_path / "a"), write(tmp_path / "b"), write(tmp_path / "c", seed=1)
    assert digest(first) == digest(again) != digest(other)
    assert first.stat().st_size < 1_000_000


@pytest.mark.parametrize("write", GENERATING)
def test_greedy_text_varies_and_depends_on_the_prompt(write: Callable[[Path], Path], tmp_path: Path) -> None:
    with opened(write(tmp_path / "model.gguf")) as model:
        replies = [model.greedy(prompt)[0] for prompt in PROMPTS]
        texts = [model.text(reply) for reply in replies]  # raises if one is not UTF-8
    assert len(set(texts)) == len(PROMPTS)
    assert min(len(set(reply)) for reply in replies) > 32


@pytest.mark.parametrize("write", GENERATING)
def test_the_best_token_leads_by_more_than_a_rounding(write: Callable[[Path], Path], tmp_path: Path) -> None:
    """A batch of 16 moves logits by 0.003 at most 99 times of 100 (0.006 with the SWA model)."""
    with opened(write(tmp_path / "model.gguf")) as model:
        leads = [lead for prompt in PROMPTS for lead in model.greedy(prompt)[1]]
    assert np.percentile(leads, 2) > 0.01
    assert np.percentile(leads, 50) > 0.5


@pytest.mark.parametrize("write", GENERATING)
def test_generation_does_not_end_by_chance(write: Callable[[Path], Path], tmp_path: Path) -> None:
    with opened(write(tmp_path / "model.gguf")) as model:
        assert [len(model.greedy(prompt, limit=200)[0]) for prompt in PROMPTS] == [200] * len(PROMPTS)


def test_generation_ends_early_if_asked_for(tmp_path: Path) -> None:
    with opened(tiny_gguf.write_tiny_llama(tmp_path / "model.gguf", eog_likely=True)) as model:
        lengths = [len(model.greedy(prompt, limit=200)[0]) for prompt in PROMPTS]
    assert max(lengths) < 200
    assert len(set(lengths)) > 4


def test_stray_bytes_come_up_if_asked_for(tmp_path: Path) -> None:
    with opened(tiny_gguf.write_tiny_llama(tmp_path / "model.gguf", bytes_likely=True)) as model:
        reply = model.greedy("The river")[0]
    assert any(tiny_gguf.FIRST_BYTE + 0x80 <= token < tiny_gguf.IM_START for token in reply)


@pytest.mark.parametrize("text", ["The river and my house", "日本語 é", "🦜 and 🧪", "a\nb\tc", "½ – naïve"])
def test_text_survives_the_tokenizer(text: str, tiny_model_path: Path) -> None:
    with opened(tiny_model_path) as model:
        bos, *tokens = model.tokenize(text)
        assert bos == tiny_gguf.BOS
        assert model.text(tokens) == f" {text}"  # SPM puts a space before the first word


def test_common_words_are_one_token_and_others_are_bytes(tiny_model_path: Path) -> None:
    with opened(tiny_model_path) as model:
        assert len(model.tokenize("people")) == 2
        parrot = model.tokenize("🦜")[-4:]
        assert parrot == [tiny_gguf.FIRST_BYTE + byte for byte in "🦜".encode()]


def test_control_tokens_are_known_and_end_generation(tiny_model_path: Path) -> None:
    with opened(tiny_model_path) as model:
        assert model.tokenize("<|im_start|>", special=True)[-1] == tiny_gguf.IM_START
        assert tiny_gguf.IM_START not in model.tokenize("<|im_start|>")
        assert model.piece(tiny_gguf.IM_END, special=True) == b"<|im_end|>"
        ends = [t for t in range(tiny_gguf.FIRST_PIECE) if llama_cpp.llama_vocab_is_eog(model.vocab, t)]
        assert ends == [tiny_gguf.EOS, tiny_gguf.IM_END]


def test_chat_template_is_the_one_given_or_none(tmp_path: Path) -> None:
    for template in (tiny_gguf.CHATML, "{{ messages[0]['content'] }}", None):
        path = tiny_gguf.write_tiny_llama(tmp_path / "model.gguf", chat_template=template)
        with opened(path) as model:
            found = llama_cpp.llama_model_chat_template(model.model, None)
        assert found == (None if template is None else template.encode())


def test_another_order_of_pieces_is_another_tokenizer(tiny_model_path: Path, tmp_path: Path) -> None:
    path = tiny_gguf.write_tiny_llama(tmp_path / "model.gguf", pieces=tiny_gguf.PIECES[::-1])
    with opened(tiny_model_path) as one, opened(path) as other:
        assert one.tokenize("The river") != other.tokenize("The river")


def test_half_precision_works_and_halves_the_file(tiny_model_path: Path, tmp_path: Path) -> None:
    path = tiny_gguf.write_tiny_llama(tmp_path / "model.gguf", dtype=np.float16)
    assert path.stat().st_size < 0.6 * tiny_model_path.stat().st_size
    with opened(path) as model:
        assert len(set(model.greedy("The river")[0])) > 32


def test_nan_weights_make_every_logit_nan(tmp_path: Path) -> None:
    with opened(tiny_gguf.write_tiny_llama(tmp_path / "model.gguf", nan_weights=True)) as model:
        assert np.isnan(model.logits([1, 300])).all()


def test_swa_model_forgets_what_lies_before_its_window(tiny_swa_path: Path) -> None:
    with opened(tiny_swa_path, swa_full=False) as model:
        assert llama_cpp.llama_model_n_swa(model.model) == 32
        for _ in range(20):
            model.logits(list(range(300, 320)))
        assert llama_cpp.llama_memory_seq_pos_min(model.memory, 0) > 0
        assert llama_cpp.llama_memory_seq_pos_max(model.memory, 0) == 399


def test_mamba_model_is_recurrent_and_cannot_be_cut_back(tmp_path: Path) -> None:
    with opened(tiny_gguf.write_tiny_mamba(tmp_path / "model.gguf")) as model:
        assert llama_cpp.llama_model_is_recurrent(model.model)
        model.logits(list(range(300, 320)))
        assert not llama_cpp.llama_memory_seq_rm(model.memory, 0, 10, -1)


def test_bert_model_loads_and_has_no_memory_to_generate_with(tmp_path: Path) -> None:
    with opened(tiny_gguf.write_tiny_bert(tmp_path / "model.gguf")) as model:
        assert not model.memory


def test_damage_is_the_same_each_time_and_each_has_a_name(tiny_model_path: Path) -> None:
    good = tiny_model_path.read_bytes()
    damaged = list(damaged_gguf.corpus(good, truncations=10, flips=20))
    assert damaged == list(damaged_gguf.corpus(good, truncations=10, flips=20))
    assert len({name for name, _ in damaged}) == len(damaged)
    assert all(data != good for _, data in damaged)


_LOAD_EACH = """
import os, signal, sys, llama_cpp
for path in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        params = llama_cpp.llama_model_default_params()
        model = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
        os._exit(0 if model else 1)
    print(path, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), sep="\\t")
"""


def test_no_damage_but_flipped_bits_is_ever_loaded(tiny_model_path: Path, tmp_path: Path) -> None:
    names = {str(tiny_model_path): "good"}
    for name, data in damaged_gguf.corpus(tiny_model_path.read_bytes(), flips=0):
        path = tmp_path / f"{len(names)}.gguf"
        path.write_bytes(data)
        names[str(path)] = name
    done = subprocess.run(
        [sys.executable, "-c", _LOAD_EACH, *names],
        env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
    )
    codes = {names[path]: int(code) for path, code in (line.split("\t") for line in done.stdout.splitlines())}
    assert codes.keys() == set(names.values())
    assert [name for name, code in codes.items() if code == 0] == ["good"]
    assert codes["duplicate-tokens"] < 0  # the signal that killed it
