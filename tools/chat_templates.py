"""Chat templates of real models, rendered as a request would have them: ``make test-templates``.

``python -m tools.chat_templates [FOLDER]`` renders every ``*.jinja`` of a folder (by default those that come with
llama.cpp's source) for several conversations, one that is to be continued, and one of 2,000 messages within a second.
How the model marks its reasoning has to be known wherever a template speaks of it (`_unknown_style`).
With ``--server PATH`` a llama-server renders the same, and what it writes must be the same, but for what `DIFFERENT`
says.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from engines.errors import InvalidPrompt
from engines.llamacpp.chat import ChatTemplate
from engines.llamacpp.families import find_style
from testkit.tiny_gguf import write_tiny_llama

BUILD = Path(__file__).parents[1] / "build"
WITH_SOURCE = "llama_cpp_python-*/vendor/llama.cpp/models/templates"

MANY = 2000
MANY_S = 1.0
BOS, EOS, UNK = "<s>", "</s>", "<unk>"  # the tiny model's

Conversation = list[dict[str, str]]


def _talk(*contents: str, system: str | None = None) -> Conversation:
    roles = ["user", "assistant"]
    turns = [{"role": roles[number % 2], "content": content} for number, content in enumerate(contents)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


CONVERSATIONS: Mapping[str, Conversation] = {
    "a question": _talk("Name three rivers."),
    "with a system message": _talk("Name three rivers.", system="Answer in one sentence."),
    "three turns": _talk("Hi", "Hello! How can I help?", "Name <three> 'rivers' & \"日本\" \\ {{ x }}"),
    "three turns, system": _talk("Hi", "Hello!", "Name three rivers.", system="You are a poet."),
    "reasoning in the history": _talk("Hi", "<think>\nThey greet me.\n</think>\n\nHello!", "Name three rivers."),
    "blanks": _talk("  Hi \n", " Hello!\n", "\n Name three rivers. "),
}

ARGUMENTS: Mapping[str, Mapping[str, object]] = {"": {}, "without thinking": {"enable_thinking": False}}

DIFFERENT: Mapping[str, str] = {
    "Apertus-8B-Instruct": "llama-server finds no thinking block in it, and turns thinking off unless it is asked for",
}
"""Template to the reason why llama-server writes something else."""

ANSWER = "The first is the"

THINKS = re.compile(r"reasoning_content|think\b|thinking|THINK")
BY_TOKENS: Mapping[str, Sequence[str]] = {"tencent-Hy3": ("<think:opensource>", "</think:opensource>")}
"""Tokens by which the style is found, where the template puts the markers together from parts."""


def main() -> int:
    """The command: prints one line for each template that is not as it should be."""
    parser = argparse.ArgumentParser(prog="python -m tools.chat_templates", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="where *.jinja are; default: in build/")
    parser.add_argument("--server", type=Path, help="a llama-server to compare with")
    parser.add_argument("--only", default="", help="only templates whose name holds this")
    options = parser.parse_args()
    folder = options.folder or next(BUILD.glob(WITH_SOURCE), None)
    if folder is None:
        print("there is no source of llama.cpp in build/; name a folder of templates")
        return 2
    faults = 0
    paths = sorted(path for path in folder.glob("*.jinja") if options.only in path.name)
    for path in paths:
        for fault in _faults(path, options.server):
            faults += 1
            print(f"{path.stem}: {fault}")
    print(f"{len(paths)} templates, {faults} faults")
    return 1 if faults else 0


def _faults(path: Path, server: Path | None) -> Iterator[str]:
    try:
        template = ChatTemplate(path.read_text("utf-8"), bos=BOS, eos=EOS, unk=UNK, controls=[])
        template.try_out()
    except InvalidPrompt as error:
        yield f"cannot be used: {error}: {error.__cause__!r}"
        return
    yield from _slow(template)
    yield from _unknown_style(path)
    text = _rendered(template, _talk("Name three rivers.", ANSWER), {})
    if not text.endswith(ANSWER):
        yield f"cannot be continued: {text[-200:]!r}"
    with contextlib.ExitStack() as stack:
        url = None if server is None else stack.enter_context(_llama_server(server, path))
        differences = []
        for name, messages in CONVERSATIONS.items():
            for how, arguments in ARGUMENTS.items():
                label = f"{name}{how and ', '}{how}"
                ours = _rendered(template, messages, arguments)
                theirs = ours if url is None else _asked(url, messages, arguments)
                if not _same(ours, theirs):
                    differences.append(f"{label}:\n{_difference(theirs, ours)}")
                elif ours.startswith("FAILS"):
                    yield f"{label}: {ours}"
        reason = DIFFERENT.get(path.stem)
        if reason is None:
            yield from differences
        elif url is not None:
            print(f"{path.stem}: {len(differences)} conversations differ, as expected: {reason}")
            if not differences:
                yield "does not differ any more"


def _unknown_style(path: Path) -> Iterator[str]:
    source = path.read_text("utf-8")
    known = find_style(source, is_token=lambda text: path.stem in BY_TOKENS and text in BY_TOKENS[path.stem])
    if THINKS.search(source) and known is None:
        yield "it speaks of thinking, and no known style is in it"


def _slow(template: ChatTemplate) -> Iterator[str]:
    messages = _talk(*(f"Message {number}, of some length. " * 8 for number in range(MANY - 1)))
    began = time.thread_time()
    text = _rendered(template, messages, {})
    took_s = time.thread_time() - began
    if text.startswith("FAILS"):
        yield f"{MANY} messages: {text}"
    elif took_s > MANY_S:
        yield f"{MANY} messages take {took_s:.2f} s"


def _rendered(template: ChatTemplate, messages: Conversation, arguments: Mapping[str, object]) -> str:
    try:
        return template.render(messages, arguments=arguments).text  # type: ignore[arg-type]  # they are
    except InvalidPrompt as error:
        return f"FAILS {error} {error.__cause__ or ''}"


def _same(ours: str, theirs: str) -> bool:
    """But for the BOS, which llama-server leaves to its tokenizer."""
    return ours.removeprefix(BOS) == theirs.removeprefix(BOS) or {ours[:5], theirs[:5]} == {"FAILS"}


def _difference(theirs: str, ours: str) -> str:
    lines = difflib.unified_diff(
        theirs.splitlines(keepends=True), ours.splitlines(keepends=True), "llama-server", "orchd", n=1
    )
    return "\n".join(repr(line)[:200] for line in lines)


@contextlib.contextmanager
def _llama_server(program: Path, template: Path) -> Iterator[str]:
    """Its address, once it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        model = write_tiny_llama(Path(folder) / "tiny.gguf")
        command = [
            program,
            "-m",
            model,
            "--port",
            port,
            "-c",
            256,
            "-np",
            1,
            "--jinja",
            "--chat-template-file",
            template,
        ]
        process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            _await(f"http://127.0.0.1:{port}/health", process)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait()


def _await(url: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        with contextlib.suppress(urllib.error.URLError, ConnectionError), urllib.request.urlopen(url, timeout=5):
            return
        if process.poll() is not None:
            raise SystemExit("llama-server has left")
        time.sleep(0.05)
    raise SystemExit("llama-server does not answer")


def _asked(url: str, messages: Sequence[Mapping[str, str]], arguments: Mapping[str, object]) -> str:
    body = json.dumps({"messages": messages, "chat_template_kwargs": arguments}).encode()
    request = urllib.request.Request(f"{url}/apply-template", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return str(json.load(answer)["prompt"])
    except urllib.error.HTTPError as error:
        return f"FAILS {error.read().decode()[:300]}"


if __name__ == "__main__":
    sys.exit(main())
