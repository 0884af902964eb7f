"""Submits of a mebibyte, of every shape that has cost a server much more than that."""

from __future__ import annotations

SIZE = 1 << 20
"""`server.max_body_bytes` as it comes, in bytes."""


def _fill(head: bytes, unit: bytes, tail: bytes, between: bytes = b",") -> bytes:
    """As many units as fit."""
    count = (SIZE - len(head) - len(tail) + len(between)) // (len(unit) + len(between))
    return head + between.join([unit] * count) + tail


_HALFWAY = b"2.22507385850720113605740979670913197593481954635164564802342610972482222202107694551654e-308"
_EMPTY = b'{"role":"user","content":""}'
SHAPES: dict[str, bytes] = {
    "empty messages": _fill(b'{"messages":[', _EMPTY, b"]}"),
    "5,000 empty messages": b'{"messages":[' + b",".join([_EMPTY] * 5000) + b"]}",
    "messages of control tokens": _fill(b'{"messages":[', b'{"role":"user","content":"<s><s><s>"}', b"]}"),
    "words": _fill(b'{"prompt":"', b"the river", b'"}', b" "),
    "one word": _fill(b'{"prompt":"', b"a", b'"}', b""),
    "control tokens": _fill(b'{"prompt":"', b"<s>", b'"}', b""),
    "control tokens and blanks": _fill(b'{"prompt":"', b"<|im_end|>", b'"}', b" "),
    # No larger: llama.cpp takes time with the square of the bytes that have no token but their own, here 90 s for all.
    "a message of words": _fill(b'{"messages":[{"role":"user","content":"', b"the river", b'"}]}', b" "),
    "a message of one word": _fill(b'{"messages":[{"role":"user","content":"', b"a", b'"}]}', b""),
    "a message of control tokens": _fill(b'{"messages":[{"role":"user","content":"', b"<|im_end|>", b'"}]}', b""),
    "a message of control tokens and blanks": _fill(b'{"messages":[{"role":"user","content":"', b"</s>", b'"}]}', b" "),
    "a message of many scripts": _fill(b'{"messages":[{"role":"user","content":"', "<e‹e字🙂".encode(), b'"}]}', b""),
    "messages of both roles": _fill(b'{"messages":[', b'{"role":"assistant","content":"a"},' + _EMPTY, b"]}"),
    "2,000 messages of control tokens": b'{"messages":['
    + b",".join([b'{"role":"user","content":"' + b"<|im_end|><|im_start|>" * 20 + b'"}'] * 2000)
    + b"]}",
    "almost control tokens": b'{"prompt":"' + b"<|" * 40_000 + b'"}',
    "escapes": _fill(b'{"prompt":"', rb"\ud83d\ude42", b'"}', b""),
    "blanks": b" " * (SIZE - 14) + b'{"prompt":"a"}',
    "stop strings": _fill(b'{"prompt":"a","stop":[', b'"x"', b"]}"),
    "deep": b'{"prompt":"a","x":' + b"[" * (SIZE - 20),
    "a number of a million digits": _fill(b'{"prompt":"a","max_tokens":', b"9", b"}", b""),
    "numbers that are hard to round": _fill(b'{"prompt":"a",', b'"min_p":' + _HALFWAY, b"}"),
    "the same field again": _fill(b'{"prompt":"a",', b'"seed":1', b"}"),
    "an unknown field's name": _fill(b'{"prompt":"a","', b"prompts", b'":1}', b""),
    "a priority": _fill(b'{"prompt":"a","priority":"', b"`", b'"}', b""),
    "a schema of many values": _fill(b'{"prompt":"a","max_tokens":1,"json_schema":{"enum":[', b'"a"', b"]}}"),
    "a deep schema": b'{"prompt":"a","json_schema":' + b'{"items":' * 50_000 + b"{}" + b"}" * 50_001,
    "a path": _fill(b'{"prompt":"a","model_ref":"', b"a", b'"}', b"/"),
    "a task id": _fill(b'{"prompt":"a","task_id":"', b"0", b'"}', b""),
    "not JSON": b"a" * SIZE,
}
