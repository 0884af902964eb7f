"""The terminal picture of the README: real commands against a real server, drawn as they looked.

    python -m tools.terminal_svg        # or `make terminal`; writes docs/images/terminal.svg

The server runs the demo model in a home folder of its own. Nothing in the picture is typed in by hand but the commands.
"""

from __future__ import annotations

import argparse
import io
import os
import pty
import re
import shlex
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

from testkit.process import orchd_serve

FILE = Path(__file__).parents[1] / "docs" / "images" / "terminal.svg"
COLUMNS = 96
COMMANDS = (
    'orchd run --temperature 0 "Explain what a river is in one sentence."',
    "orchd health",
    "orchd reload default",
)
BLACK, WHITE = (24, 26, 31), (222, 225, 230)
RED, GREEN, YELLOW = (229, 115, 115), (129, 199, 132), (229, 192, 123)
BLUE, MAGENTA, CYAN = (100, 160, 240), (198, 120, 221), (86, 182, 194)
THEME = TerminalTheme(BLACK, WHITE, [BLACK, RED, GREEN, YELLOW, BLUE, MAGENTA, CYAN, WHITE])
FORMAT = """\
<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg" role="img" aria-label="orchd in a terminal">
<style>
.{unique_id}-matrix {{
  font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: {char_height}px; line-height: {line_height}px; font-variant-east-asian: full-width;
}}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/>
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def shown_by(command: str, env: dict[str, str]) -> str:
    """What a command prints on a terminal, colours included."""
    words = [sys.executable, "-m", *shlex.split(command)]
    pid, terminal = pty.fork()
    if not pid:
        os.execvpe(words[0], words, env)
    printed = b""
    while True:
        try:
            block = os.read(terminal, 65536)
        except OSError:  # it has ended
            break
        if not block:
            break
        printed += block
    os.close(terminal)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        raise RuntimeError(f"{command}: {printed.decode()}")
    return last_look(printed.decode())


def last_look(printed: str) -> str:
    """What is left on the terminal once lines were redrawn or taken back, as a spinner does."""
    text = re.sub(r"\x1b\[\?25[lh]", "", printed)  # the cursor
    text = re.sub(r"[^\n]*\r?\n\r\x1b\[1A\x1b\[2K", "", text)  # one line up again
    text = re.sub(r"[^\n]*\r\x1b\[2K", "", text)  # back to the beginning of the line
    return text.replace("\r\n", "\n").strip("\n")


def picture(env: dict[str, str]) -> str:
    """All commands one after the other."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    for number, command in enumerate(COMMANDS):
        console.print(*([""] if number else []), Text.assemble(("$ ", "bold green"), (command, "bold")), sep="\n")
        console.print(Text.from_ansi(shown_by(command, env)))
    console.print()  # the last line is cut off below its base line
    return console.export_svg(title="orchd", theme=THEME, code_format=FORMAT, unique_id="terminal")


def main() -> None:
    """Draw it and write it down."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as folder, orchd_serve(home=Path(folder), token=None) as server:
        server.wait_ready()
        env = {**server.environ, "COLUMNS": str(COLUMNS), "TERM": "xterm-256color"}
        FILE.write_text(picture(env), encoding="utf-8")
        server.stop()
    print(f"wrote {FILE}")


if __name__ == "__main__":
    main()
