"""Small but real GGUF files, written in milliseconds: the same arguments give the same bytes.

The weights are noise, shaped so that tests can rely on what llama.cpp does with them:

- Attention is sharp and weighs as much as the current token, so that greedy text depends on the whole prompt
  and does not loop. More of it would also multiply roundings.
- Logits are spread, so that the best token leads the second by far more than a rounding, nearly always.
- A token whose row of the output matrix is zero has logit 0 and is never the best. Control and byte tokens
  are such unless asked for: text does not end by chance and is valid UTF-8.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from gguf import GGUFWriter, PoolingType, TokenType
from numpy.typing import NDArray

Weights = NDArray[np.float32]

EMBEDDING, HEADS, KV_HEADS, FEED_FORWARD, LAYERS = 64, 4, 2, 128, 2
HEAD = EMBEDDING // HEADS
CONTEXT = 4096

UNKNOWN, BOS, EOS = 0, 1, 2
FIRST_BYTE = 3
IM_START, IM_END = 259, 260
FIRST_PIECE = 261

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_WORDS = """
    the of and a to in is you that it he was for on are as with his they I at be this have from or one
    had by word but not what all were we when your can said there use an each which she do how their if
    will up other about out many then them these so some her would make like him into time has look two
    more write go see number no way could people my than first water been call who oil its now find long
    down day did get come made may part over new sound take only little work know place year live me
    back give most very after thing our just name good sentence man think say great where help through
    much before line right too mean old any same tell boy follow came want show also around farm three
    small set river user assistant system hello world
"""
_ENDINGS = "ed ing er ly ion tion th he re nd ou ng st ea .▁and .▁The , . ! ? : ; - ' ( ) 0 1 2 3 4 5 6 7 8 9"
_MULTIBYTE = "é è ü ö ä ñ ç ß ø å ь н о а и т 日 本 語 日本 日本語 中 文 字 한 글 λ π ∑ → € – “ ” … 🙂 🚀"


def _default_pieces() -> tuple[str, ...]:
    # SPM merges pair by pair, so that a word needs its beginnings.
    words = [f"▁{word[:end]}" for word in _WORDS.split() for end in range(1, len(word) + 1)]
    others = [*string.ascii_letters, *_ENDINGS.split(), *_MULTIBYTE.split()]
    return tuple(dict.fromkeys(["▁", *words, *others]))


PIECES = _default_pieces()
"""The normal tokens, with ``▁`` for a space. Of two possible merges SPM takes the piece that stands first."""


def write_tiny_llama(
    path: Path,
    *,
    seed: int = 0,
    pieces: Sequence[str] = PIECES,
    more: Mapping[str, TokenType] | None = None,
    chat_template: str | int | list[str] | None = CHATML,
    n_ctx_train: int = CONTEXT,
    dtype: type[np.float32] | type[np.float16] = np.float32,
    eog_likely: bool = False,
    bytes_likely: bool = False,
    nan_weights: bool = False,
    least: bool = False,
    head: int = HEAD,
    name: str = "tiny-llama",
) -> Path:
    """Write a llama-architecture model and return `path`.

    Args:
        path: Where to; replaced if it exists.
        seed: Of the weights.
        pieces: The normal tokens, ids from `FIRST_PIECE`: another tuple or order is another tokenizer.
        more: Further tokens, behind the normal ones, with their types; the model writes them as often.
        chat_template: None leaves the key out; what is no text is as damaged files have it.
        n_ctx_train: The context length that the file claims.
        dtype: Of the matrices.
        eog_likely: End-of-generation tokens come up after some 15 tokens on average, depending on the prompt.
        bytes_likely: Byte tokens come up as often as others, so text holds stray bytes of UTF-8.
        nan_weights: Every logit is NaN.
        least: One layer with one head, for where only the work around the forward pass counts.
        head: Size of a head; a quantised cache needs a multiple of 32.
        name: ``general.name``.
    """
    file = _TinyFile(path, "llama", seed=seed, dtype=dtype)
    layers, heads, kv_heads = (1, 1, 1) if least else (LAYERS, HEADS, KV_HEADS)
    file.describe(name=name, n_ctx_train=n_ctx_train, layers=layers)
    file.attention(heads=heads, kv_heads=kv_heads, head=head)
    count = len(pieces) + len(more or {})
    file.vocabulary(pieces, chat_template, more or {})
    file.matrix("token_embd", count + FIRST_PIECE, EMBEDDING, rms=1.0)
    for layer in range(layers):
        block = f"blk.{layer}"
        file.norm(f"{block}.attn_norm", EMBEDDING)
        file.matrix(f"{block}.attn_q", heads * head, EMBEDDING, gain=2.0)
        file.matrix(f"{block}.attn_k", kv_heads * head, EMBEDDING, gain=2.0)
        file.matrix(f"{block}.attn_v", kv_heads * head, EMBEDDING)
        file.matrix(f"{block}.attn_output", EMBEDDING, heads * head)
        file.feed_forward(block)
    file.head(count, eog_likely=eog_likely, bytes_likely=bytes_likely, nan=nan_weights)
    return file.finish()


def write_tiny_swa(
    path: Path, *, window: int = 32, seed: int = 0, head: int = HEAD, n_ctx_train: int = CONTEXT
) -> Path:
    """Write a Gemma 3 model whose first layer sees `window` tokens back and whose second layer sees all."""
    file = _TinyFile(path, "gemma3", seed=seed)
    file.describe(name="tiny-swa", n_ctx_train=n_ctx_train)
    file.attention(head=head)
    file.writer.add_sliding_window(window)
    file.writer.add_sliding_window_pattern(2)
    file.vocabulary(PIECES, CHATML)
    # Gemma multiplies embeddings by sqrt(EMBEDDING) on their way in.
    file.matrix("token_embd", len(PIECES) + FIRST_PIECE, EMBEDDING, rms=EMBEDDING**-0.5)
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        file.norm(f"{block}.attn_norm", EMBEDDING)
        file.matrix(f"{block}.attn_q", HEADS * head, EMBEDDING)
        file.matrix(f"{block}.attn_k", KV_HEADS * head, EMBEDDING)
        file.norm(f"{block}.attn_q_norm", head, scale=2.0)
        file.norm(f"{block}.attn_k_norm", head, scale=2.0)
        file.matrix(f"{block}.attn_v", KV_HEADS * head, EMBEDDING)
        file.matrix(f"{block}.attn_output", EMBEDDING, HEADS * head)
        file.norm(f"{block}.post_attention_norm", EMBEDDING)
        file.feed_forward(block)
        file.norm(f"{block}.post_ffw_norm", EMBEDDING)
    file.head(len(PIECES))
    return file.finish()


def write_tiny_cogvlm(path: Path, *, seed: int = 0, n_ctx_train: int = CONTEXT) -> Path:
    """Write a model whose graph in llama.cpp computes the logits of every row, asked for or not."""
    file = _TinyFile(path, "cogvlm", seed=seed)
    file.describe(name="tiny-cogvlm", n_ctx_train=n_ctx_train)
    file.attention(kv_heads=HEADS)
    file.vocabulary(PIECES, CHATML)
    file.matrix("token_embd", len(PIECES) + FIRST_PIECE, EMBEDDING, rms=1.0)
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        file.norm(f"{block}.attn_norm", EMBEDDING)
        file.feed_forward(block)
        for part in ("attn", "vis_attn"):  # of text, and of images
            file.matrix(f"{block}.{part}_qkv", 3 * EMBEDDING, EMBEDDING, gain=2.0)
            file.matrix(f"{block}.{part}_output", EMBEDDING, EMBEDDING)
        file.matrix(f"{block}.vis_gate", FEED_FORWARD, EMBEDDING)
        file.matrix(f"{block}.vis_up", FEED_FORWARD, EMBEDDING)
        file.matrix(f"{block}.vis_down", EMBEDDING, FEED_FORWARD)
    file.head(len(PIECES))
    return file.finish()


def write_tiny_mamba(path: Path, *, seed: int = 0, n_ctx_train: int = CONTEXT) -> Path:
    """Write a recurrent model: its memory of a sequence cannot be cut back to an earlier token."""
    inner, state, conv, rank = 2 * EMBEDDING, 16, 4, 4  # llama.cpp wants inner == 2 * embedding
    file = _TinyFile(path, "mamba", seed=seed)
    file.describe(name="tiny-mamba", n_ctx_train=n_ctx_train)
    file.writer.add_feed_forward_length(0)
    file.writer.add_head_count(0)
    file.writer.add_ssm_inner_size(inner)
    file.writer.add_ssm_state_size(state)
    file.writer.add_ssm_conv_kernel(conv)
    file.writer.add_ssm_time_step_rank(rank)
    file.vocabulary(PIECES, CHATML)
    file.matrix("token_embd", len(PIECES) + FIRST_PIECE, EMBEDDING, rms=1.0)
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        file.norm(f"{block}.attn_norm", EMBEDDING)
        file.matrix(f"{block}.ssm_in", 2 * inner, EMBEDDING, gain=2.0)
        file.matrix(f"{block}.ssm_conv1d", inner, conv, always_f32=True)
        file.norm(f"{block}.ssm_conv1d", inner, scale=0.0, kind=".bias")
        file.matrix(f"{block}.ssm_x", rank + 2 * state, inner)
        file.matrix(f"{block}.ssm_dt", inner, rank)
        file.norm(f"{block}.ssm_dt", inner, scale=-2.0, kind=".bias")
        file.tensor(f"{block}.ssm_a", -np.tile(np.arange(1, state + 1, dtype=np.float32), (inner, 1)))
        file.norm(f"{block}.ssm_d", inner, kind="")
        file.matrix(f"{block}.ssm_out", EMBEDDING, inner, gain=2.0)
    file.head(len(PIECES))
    return file.finish()


def write_tiny_lfm2(
    path: Path, *, window: int = 32, seed: int = 0, head: int = HEAD, n_ctx_train: int = CONTEXT
) -> Path:
    """Write a hybrid: its first layer is a recurrent convolution, and its second layer sees `window` tokens back."""
    conv, heads = 3, EMBEDDING // head  # llama.cpp wants heads * head == embedding
    kv_heads = heads // 2
    file = _TinyFile(path, "lfm2", seed=seed)
    file.describe(name="tiny-lfm2", n_ctx_train=n_ctx_train)
    file.attention(heads=heads, kv_heads=[0, kv_heads], head=head)
    file.writer.add_sliding_window(window)
    file.writer.add_shortconv_l_cache(conv)
    file.vocabulary(PIECES, CHATML)
    file.matrix("token_embd", len(PIECES) + FIRST_PIECE, EMBEDDING, rms=1.0)
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        file.norm(f"{block}.attn_norm", EMBEDDING)
        if layer == 0:
            file.matrix(f"{block}.shortconv.conv", EMBEDDING, conv, always_f32=True)
            file.matrix(f"{block}.shortconv.in_proj", 3 * EMBEDDING, EMBEDDING)
            file.matrix(f"{block}.shortconv.out_proj", EMBEDDING, EMBEDDING)
        else:
            file.matrix(f"{block}.attn_q", EMBEDDING, EMBEDDING)
            file.matrix(f"{block}.attn_k", kv_heads * head, EMBEDDING)
            file.norm(f"{block}.attn_q_norm", head, scale=2.0)
            file.norm(f"{block}.attn_k_norm", head, scale=2.0)
            file.matrix(f"{block}.attn_v", kv_heads * head, EMBEDDING)
            file.matrix(f"{block}.attn_output", EMBEDDING, EMBEDDING)
        file.feed_forward(block)
    file.head(len(PIECES), norm="token_embd_norm")
    return file.finish()


def write_tiny_bert(path: Path, *, seed: int = 0, n_ctx_train: int = 512) -> Path:
    """Write an embedding model: llama.cpp loads it, and it generates nothing."""
    file = _TinyFile(path, "bert", seed=seed)
    file.describe(name="tiny-bert", n_ctx_train=n_ctx_train)
    file.attention(kv_heads=HEADS)
    file.writer.add_layer_norm_eps(1e-12)
    file.writer.add_causal_attention(False)
    file.writer.add_pooling_type(PoolingType.MEAN)
    file.writer.add_token_type_count(2)
    file.vocabulary(PIECES, None)
    file.matrix("token_embd", len(PIECES) + FIRST_PIECE, EMBEDDING, rms=1.0)
    file.matrix("token_types", 2, EMBEDDING)
    file.matrix("position_embd", n_ctx_train, EMBEDDING)
    file.layer_norm("token_embd_norm")
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            file.matrix(f"{block}.{part}", EMBEDDING, EMBEDDING)
        file.layer_norm(f"{block}.attn_output_norm")
        file.matrix(f"{block}.ffn_up", FEED_FORWARD, EMBEDDING)
        file.matrix(f"{block}.ffn_down", EMBEDDING, FEED_FORWARD)
        file.layer_norm(f"{block}.layer_output_norm")
    return file.finish()


class _TinyFile:
    """A GGUF in the making. Matrices are drawn in the order of the calls."""

    def __init__(
        self,
        path: Path,
        architecture: str,
        *,
        seed: int,
        dtype: type[np.float32] | type[np.float16] = np.float32,
    ) -> None:
        self.path = path
        self.writer = GGUFWriter(path, architecture)
        self._random = np.random.default_rng(seed)
        self._dtype = dtype

    def describe(self, *, name: str, n_ctx_train: int, layers: int = LAYERS) -> None:
        self.writer.add_name(name)
        self.writer.add_context_length(n_ctx_train)
        self.writer.add_embedding_length(EMBEDDING)
        self.writer.add_block_count(layers)
        self.writer.add_layer_norm_rms_eps(1e-5)

    def attention(self, *, heads: int = HEADS, kv_heads: int | list[int] = KV_HEADS, head: int = HEAD) -> None:
        self.writer.add_feed_forward_length(FEED_FORWARD)
        self.writer.add_head_count(heads)
        self.writer.add_head_count_kv(kv_heads)
        self.writer.add_key_length(head)
        self.writer.add_value_length(head)
        self.writer.add_rope_dimension_count(head)

    def vocabulary(
        self,
        pieces: Sequence[str],
        chat_template: str | int | list[str] | None,
        more: Mapping[str, TokenType] | None = None,
    ) -> None:
        more = more or {}
        special = [("<unk>", TokenType.UNKNOWN), ("<s>", TokenType.CONTROL), ("</s>", TokenType.CONTROL)]
        special += [(f"<0x{byte:02X}>", TokenType.BYTE) for byte in range(256)]
        special += [("<|im_start|>", TokenType.CONTROL), ("<|im_end|>", TokenType.CONTROL)]
        self.writer.add_tokenizer_model("llama")
        self.writer.add_tokenizer_pre("default")
        self.writer.add_token_list([*(text for text, _ in special), *pieces, *more])
        self.writer.add_token_scores([0.0] * len(special) + [-float(rank) for rank in range(len(pieces) + len(more))])
        self.writer.add_token_types([*(kind for _, kind in special), *[TokenType.NORMAL] * len(pieces), *more.values()])
        self.writer.add_unk_token_id(UNKNOWN)
        self.writer.add_bos_token_id(BOS)
        self.writer.add_eos_token_id(EOS)
        self.writer.add_eot_token_id(IM_END)
        self.writer.add_add_bos_token(True)
        self.writer.add_add_eos_token(False)
        self.writer.add_add_space_prefix(True)
        if isinstance(chat_template, str):
            self.writer.add_chat_template(chat_template)
        elif isinstance(chat_template, int):
            self.writer.add_uint32("tokenizer.chat_template", chat_template)
        elif chat_template is not None:
            self.writer.add_array("tokenizer.chat_template", chat_template)

    def tensor(self, name: str, values: Weights) -> None:
        self.writer.add_tensor(name, values)

    def matrix(
        self,
        name: str,
        rows: int,
        columns: int,
        *,
        gain: float = 1.0,
        rms: float | None = None,
        always_f32: bool = False,
    ) -> None:
        """`gain` is the RMS of the product with a vector of RMS 1; `rms`, if given, that of the entries."""
        scale = gain * columns**-0.5 if rms is None else rms
        values = self._random.standard_normal((rows, columns), dtype=np.float32) * np.float32(scale)
        self.writer.add_tensor(f"{name}.weight", values if always_f32 else values.astype(self._dtype))

    def norm(self, name: str, size: int, *, scale: float = 1.0, kind: str = ".weight") -> None:
        self.tensor(f"{name}{kind}", np.full(size, scale, dtype=np.float32))

    def layer_norm(self, name: str) -> None:
        self.norm(name, EMBEDDING)
        self.norm(name, EMBEDDING, scale=0.0, kind=".bias")

    def feed_forward(self, block: str) -> None:
        self.norm(f"{block}.ffn_norm", EMBEDDING)
        self.matrix(f"{block}.ffn_gate", FEED_FORWARD, EMBEDDING)
        self.matrix(f"{block}.ffn_up", FEED_FORWARD, EMBEDDING)
        self.matrix(f"{block}.ffn_down", EMBEDDING, FEED_FORWARD, gain=2.0)

    def head(
        self,
        pieces: int,
        *,
        eog_likely: bool = False,
        bytes_likely: bool = False,
        nan: bool = False,
        norm: str = "output_norm",
    ) -> None:
        """The final norm and the output matrix: logits of normal pieces have a standard deviation of 4."""
        self.norm(norm, EMBEDDING, scale=float("nan") if nan else 1.0)
        rows = self._random.standard_normal((FIRST_PIECE + pieces, EMBEDDING), dtype=np.float32)
        rows *= np.float32(4.0 * EMBEDDING**-0.5)
        ends = [EOS, IM_END]
        silent = np.ones(FIRST_PIECE, dtype=bool)
        silent[FIRST_BYTE:IM_START] = not bytes_likely
        silent[ends] = not eog_likely
        rows[:FIRST_PIECE][silent] = 0.0
        rows[ends] *= np.float32(1.6)  # so these two are the best at some 6 % of the places
        self.tensor("output.weight", rows.astype(self._dtype))

    def finish(self) -> Path:
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()
        return self.path
