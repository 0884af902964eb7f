"""What a model writes, told apart into reasoning and answer, however it is cut into tokens."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engines.llamacpp.block_channels import Blocks
from engines.llamacpp.channels import Phase, Style
from engines.llamacpp.families import find_style
from engines.llamacpp.text import OutputText


def no_token(text: str) -> bool:
    return False


def of(template: str) -> Style:
    style = find_style(template, is_token=no_token)
    assert style is not None
    return style


THINK = of("</think>")
TOKENS = Blocks("<think>", "</think>", tokens=("<think>", "</think>"))
MISTRAL = of("[/THINK]")
GEMMA = of("<channel|>")
HARMONY = of("<|channel|><|message|>")
MUSE = of("<|start|>assistant to=self<|message|><|eom|>")
SOLAR = of("<|begin|>assistant<|think|><|end|><|begin|>assistant<|content|>")
KIMI = of("'<|open|>' + tag '<|close|>' + '<|sep|>' 'think' 'response'")
APRIEL = of("[BEGIN FINAL RESPONSE]")
GRANITE = of("between <think></think> and between <response></response>")
COMMAND = of("<|END_THINKING|>")
FINAL, ANALYSIS = "<|channel|>final<|message|>", "<|channel|>analysis<|message|>"
AGAIN = "<|end|><|start|>assistant"
SELF, USER = " to=self<|message|>", "<|start|>assistant to=user<|message|>"
OPEN_THINK, CLOSE_THINK = "<|open|>think<|sep|>", "<|close|>think<|sep|>"
OPEN_RESPONSE, CLOSE_RESPONSE = "<|open|>response<|sep|>", "<|close|>response<|sep|>"
COMMAND_THINKS = "<|START_THINKING|>a<|END_THINKING|>"


class Told:
    """The two texts of a reply, and what they were made of."""

    def __init__(
        self, style: Style, pieces: Sequence[str], *, reply: str = "", stop: tuple[str, ...] = (), marks: bool = True
    ) -> None:
        self.answer = self.reasoning = ""
        self.phases: list[Phase] = []
        self.last: list[tuple[int, int]] = []
        output = OutputText(stop, style, reply)
        for piece in pieces:
            self.phases.append(output.phase)
            self.answer += output.push(piece.encode(), marks=marks or piece in style.tokens)
            self.reasoning += output.reasoning
            self.last.append((output.reasoning_index, output.index))
            if output.stopped:
                return
        self.phases.append(output.phase)
        self.answer += output.flush()
        self.reasoning += output.reasoning
        self.last.append((output.reasoning_index, output.index))

    @property
    def both(self) -> tuple[str, str]:
        return self.reasoning, self.answer


@pytest.mark.parametrize(
    ("style", "reply", "written", "both"),
    [
        (THINK, "", "<think>\nTwo.\n</think>\n\nThe Rhine.\n", ("Two.", "The Rhine.\n")),
        (THINK, "<think>\n", "Two.\n\nOr three.</think>The Rhine.", ("Two.\n\nOr three.", "The Rhine.")),
        (THINK, "", "\n<think>Two.</think>", ("Two.", "")),
        (THINK, "", "  The Rhine.", ("", "  The Rhine.")),
        (THINK, "", "<think>\n\n</think>\n\nThe Rhine.", ("", "The Rhine.")),
        (THINK, "<think>\n\n</think>\n\n", "The <think> tag.", ("", "The <think> tag.")),
        (THINK, "</think>", "\nYes.", ("", "Yes.")),
        (THINK, "", "<think>a</think>b</think>c<think>d", ("a", "b</think>c<think>d")),
        (THINK, "", "<think>a <think> b</think>c", ("a <think> b", "c")),
        (THINK, "", "<think>a</think>\n<think>b</think>c", ("ab", "c")),
        (THINK, "", "Say <think>x</think>.", ("", "Say <think>x</think>.")),
        (THINK, "", "<thin air", ("", "<thin air")),
        (THINK, "", "<thi", ("", "<thi")),
        (THINK, "", "\n", ("", "\n")),
        (THINK, "", "<think>never closes </thi", ("never closes </thi", "")),
        (THINK, "", "<think>a \n", ("a", "")),
        (THINK, "Sure: ", "<think> is a tag", ("", "<think> is a tag")),
        (THINK, "<think>\nHm,", " yes.\n</think>Yes.", (" yes.", "Yes.")),
        (THINK, "<think>\nHm.\n", "\n</think>Yes.", ("", "Yes.")),
        (THINK, "<think>\nHm.</thi", "nk>Yes.", ("", "Yes.")),
        (MISTRAL, "", "[THINK]Two.[/THINK]The Rhine.", ("Two.", "The Rhine.")),
        (GEMMA, "", "<|channel>thought\nTwo.\n<channel|>The Rhine.", ("Two.", "The Rhine.")),
        (GEMMA, "<|channel>thought\n<channel|>", "The Rhine.", ("", "The Rhine.")),
        (HARMONY, "<|start|>assistant", f"{ANALYSIS}Two.{AGAIN}{FINAL}The Rhine.", ("Two.", "The Rhine.")),
        (HARMONY, "<|start|>assistant", f"{ANALYSIS}a{AGAIN}{ANALYSIS}b{AGAIN}{FINAL}c", ("ab", "c")),
        (HARMONY, "<|start|>assistant", f"{FINAL}a{AGAIN}{FINAL}b", ("", "ab")),
        (HARMONY, "<|start|>assistant", f"<|channel|>commentary{ANALYSIS}a \n{AGAIN}{FINAL}b", ("a", "b")),
        (HARMONY, "<|start|>assistant", f"{ANALYSIS} a {FINAL}b", ("a", "b")),
        (HARMONY, "<|start|>assistant", f"{ANALYSIS}a<|start|>assistant{FINAL}b", ("a", "b")),
        (HARMONY, "<|start|>assistant", " to=user<|message|>Hello", ("", "Hello")),
        (HARMONY, "<|start|>assistant", "<|message|>Hello", ("", "Hello")),
        (HARMONY, "<|start|>assistant", "Hello", ("", "Hello")),
        (HARMONY, "<|start|>assistant", f"{ANALYSIS}a{AGAIN}", ("a", "")),
        (HARMONY, "<|start|>assistant", f"{ANALYSIS}a{AGAIN}<|channel|>fin", ("a", "")),
        (HARMONY, "<|start|>assistant", f"{ANALYSIS}a <|en", ("a <|en", "")),
        (HARMONY, f"<|start|>assistant{FINAL}", "The Rhine <|en", ("", "The Rhine <|en")),
        (HARMONY, f"<|start|>assistant{FINAL}The ", f"Rhine{AGAIN}{ANALYSIS}b", ("b", "Rhine")),
        (MUSE, "<|start|>assistant", f"{SELF}a<|eom|>{USER}b<|eot|>", ("a", "b")),
        (MUSE, "<|start|>assistant", f"{SELF}a<|eom|><|start|>assistant{SELF}b<|eom|>{USER}c", ("ab", "c")),
        (MUSE, "<|start|>assistant", "<|message|>b", ("", "b")),
        (MUSE, "<|start|>assistant", "b", ("", "b")),
        (SOLAR, "<|begin|>assistant", "<|think|>a<|end|><|begin|>assistant<|content|>b<|end|>", ("a", "b")),
        (SOLAR, "<|begin|>assistant", "<|content|>b", ("", "b")),
        (SOLAR, "<|begin|>assistant", "<|think|>a <|en", ("a <|en", "")),
        (KIMI, f"{OPEN_THINK}", f"a{CLOSE_THINK}{OPEN_RESPONSE}b{CLOSE_RESPONSE}<|close|>message<|sep|>", ("a", "b")),
        (KIMI, f"{OPEN_RESPONSE}", f"b{CLOSE_RESPONSE}", ("", "b")),
        (KIMI, f"{OPEN_THINK}", f"a{CLOSE_THINK}{OPEN_RESPONSE}the response<|close|>", ("a", "the response<|close|>")),
        (APRIEL, "Here are my reasoning steps:\n", "a\n[BEGIN FINAL RESPONSE]\nb", ("a", "b")),
        (APRIEL, "", "Here are my reasoning steps:\na\n[BEGIN FINAL RESPONSE]\nb\n[END FINAL RESPONSE]\n", ("a", "b")),
        (APRIEL, "", "Here are mine:\na\n[BEGIN FINAL RESPONSE]b", ("Here are mine:\na", "b")),
        (APRIEL, "", "a", ("a", "")),
        (APRIEL, "", "[BEGIN FINAL RESPONSE]b", ("", "b")),
        (GRANITE, "", "<think>a</think>\n<response>b</response>", ("a", "b")),
        (GRANITE, "", "<think>a</think>b</response>", ("a", "b</response>")),
        (GRANITE, "", "<response>b</response> c </response>\n", ("", "b</response> c")),
        (GRANITE, "", "<response>b\n</resp", ("", "b\n</resp")),
        (GRANITE, "", "<response>b\n", ("", "b\n")),
        (GRANITE, "", "b</response>", ("", "b</response>")),
        (COMMAND, "", f"{COMMAND_THINKS}<|START_RESPONSE|>b<|END_RESPONSE|>", ("a", "b")),
        (COMMAND, "<|START_THINKING|>", "a<|END_THINKING|><|START_TEXT|>b<|END_TEXT|>", ("a", "b")),
    ],
)
def test_a_reply_is_told_apart(style: Style, reply: str, written: str, both: tuple[str, str]) -> None:
    assert Told(style, [written], reply=reply).both == both
    assert Told(style, list(written), reply=reply).both == both


def test_a_header_that_never_ends_is_text() -> None:
    written = "<|channel|>" + "x" * 300
    assert Told(HARMONY, list(written), reply="<|start|>assistant").both == ("", written)


def test_nothing_of_the_reply_in_the_prompt_is_sent_again() -> None:
    assert Told(THINK, ["b"], reply="a").both == ("", "b")
    assert Told(THINK, ["b"], reply=" ").both == ("", "b")
    assert Told(THINK, ["b"], reply="<thi").both == ("", "b")
    assert Told(THINK, ["b"], reply="</think>\n\na", stop=("ab",)).both == ("", "b")


@pytest.mark.parametrize("text", ["<think></think>", "<think>", "</think>", " ", "\n<", "<|"])
@pytest.mark.parametrize("style", [THINK, HARMONY])
def test_a_long_beginning_of_a_reply_takes_no_time(style: Style, text: str) -> None:
    began = time.process_time()
    OutputText((), style, style.begun("", text * ((1 << 20) // len(text))))
    assert time.process_time() - began < 2


def test_where_markers_are_tokens_text_that_looks_like_them_is_text() -> None:
    pieces = ["<think>", "a ", "</", "think", "> b", "</think>", "c"]
    assert Told(TOKENS, pieces, marks=False).both == ("a </think> b", "c")


@pytest.mark.parametrize("style", [THINK, MISTRAL, GEMMA, HARMONY])
def test_stop_strings_are_looked_for_in_the_answer_alone(style: Style) -> None:
    opening = style.opening if isinstance(style, Blocks) else ANALYSIS
    closing = style.closing if isinstance(style, Blocks) else f"{AGAIN}{FINAL}"
    written = f"{opening}a\n\nb{closing}\nc\n\nd"
    told = Told(
        style, list(written), stop=("\n\n", "<|end|>", closing), reply="<|start|>assistant" if style == HARMONY else ""
    )
    assert told.reasoning == "a\n\nb"
    assert told.answer.strip() == "c"


def test_the_index_is_that_of_the_last_token_of_each_text() -> None:
    told = Told(THINK, ["<think>", "a", " b", "\n", "</th", "ink>", "\n", "c", "d"])
    assert told.last == [*[(-1, -1)], (1, -1), *[(2, -1)] * 5, (2, 7), (2, 8), (2, 8)]


def test_a_token_may_hold_the_end_of_one_and_the_beginning_of_the_other() -> None:
    told = Told(THINK, ["<think>a", "b</think>c"])
    assert (told.both, told.last[1]) == (("ab", "c"), (1, 1))


def test_reasoning_is_whole_characters_too() -> None:
    output = OutputText((), THINK, "<think>")
    seen = []
    for data in [b"\xf0\x9f", b"\x99\x82", b"caf\xc3"]:
        assert output.push(data) == ""
        seen.append((output.reasoning, output.reasoning_index))
    assert output.flush() == ""
    seen.append((output.reasoning, output.reasoning_index))
    assert seen == [("", -1), ("🙂", 1), ("caf", 2), ("\ufffd", 2)]


def test_the_phase_says_what_can_come_next() -> None:
    undecided, reasoning, answer = Phase.UNDECIDED, Phase.REASONING, Phase.ANSWER
    told = Told(THINK, ["\n", "<think>", "a", "</th", "ink>", "b"])
    assert told.phases == [undecided, undecided, reasoning, reasoning, reasoning, answer, answer]
    assert Told(THINK, ["a"], reply="<think>").phases == [reasoning, reasoning]
    assert Told(THINK, ["a"], reply="</think>").phases == [answer, answer]
    assert Told(THINK, ["a"]).phases == [undecided, answer]
    header = ["<|channel|>", "analysis", "<|message|>", "a", "<|end|>", "<|start|>", "assistant", FINAL, "b"]
    told = Told(HARMONY, header, reply="<|start|>assistant")
    assert told.phases == [*[reasoning] * 8, answer, answer]
    assert OutputText(style=THINK).phase is answer  # no conversation


def test_a_prompt_that_is_no_conversation_is_not_told_apart() -> None:
    output = OutputText(("x",), THINK, None)
    assert output.push(b"<think>a</think>b") == "<think>a</think>b"


def test_a_token_that_is_not_shown_counts_all_the_same() -> None:
    output = OutputText(("<|x|>b",))
    assert output.push(b"a", shown=True) == "a"
    assert output.push(b"<|x|>", shown=False) == ""
    assert output.push(b"a") == "a"
    assert output.push(b"<|x|>", shown=False) == ""
    assert output.push(b"bc") == ""
    assert (output.stopped, output.index) == (True, 2)


STYLES = [THINK, MISTRAL, GEMMA, HARMONY, MUSE, SOLAR, KIMI, APRIEL, GRANITE, COMMAND]
MARKERS = [
    *(OPEN_THINK, CLOSE_THINK, OPEN_RESPONSE, CLOSE_RESPONSE, "<|close|>message<|sep|>"),
    *("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]", "[END FINAL RESPONSE]"),
    *("<response>", "</response>", "<|think|>", "<|content|>", "<|begin|>assistant", SELF, "<|eom|>", USER),
    *("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    "<think>",
    "</think>",
    "[THINK]",
    "[/THINK]",
    "<|channel>thought",
    "<channel|>",
    "<|channel|>",
    "<|message|>",
]
WORDS = ["assistant", "analysis", "final", " to=", "a", "b ", " ", "\n", "<", "</", "é", "🙂", "\0"]
fragments = st.sampled_from([*MARKERS, "<|start|>", "<|end|>", *WORDS])
replies = st.sampled_from(["", "a", " ", "<think>\n", "<|start|>assistant", "<think>x", f"<|start|>assistant{FINAL}"])
writings = st.lists(fragments, max_size=20).map("".join)
cuts = st.lists(st.integers(0, 200), max_size=30)


def cut(text: str, places: list[int]) -> list[str]:
    edges = [0, *sorted(min(place, len(text)) for place in places), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


@given(
    st.sampled_from(STYLES), replies, writings, cuts, st.sampled_from([(), ("b",), ("a\n", "<|end|>"), ("</think>",)])
)
@example(HARMONY, "<|start|>assistant", f"{ANALYSIS}\n<|start|>a", [3], ())
def test_how_a_reply_is_cut_makes_no_difference(
    style: Style, reply: str, written: str, places: list[int], stop: tuple[str, ...]
) -> None:
    whole = Told(style, [written], reply=reply, stop=stop)
    assert Told(style, cut(written, places), reply=reply, stop=stop).both == whole.both
    assert Told(style, list(written), reply=reply, stop=stop).both == whole.both


@given(st.sampled_from(STYLES), replies, writings, cuts)
def test_both_texts_are_of_what_was_written_in_its_order(
    style: Style, reply: str, written: str, places: list[int]
) -> None:
    told = Told(style, cut(written, places), reply=reply)
    for text in told.both:
        rest = iter(written)
        assert all(char in rest for char in text)


@given(st.sampled_from(STYLES), replies, writings, writings)
def test_where_a_reply_goes_on_makes_no_difference(style: Style, reply: str, first: str, second: str) -> None:
    """What the prompt already holds is told apart as what the model writes."""
    whole = Told(style, [reply + first, second])
    told = Told(style, [second], reply=reply + first)
    assert (told.phases[0], told.phases[-1]) == (whole.phases[1], whole.phases[-1])
    assert all(text.endswith(new) for text, new in zip(whole.both, told.both, strict=True))


@pytest.mark.parametrize(
    ("template", "style"),
    [
        ("", None),
        ("{{ messages }}", None),
        ("... '<think>\n' ... '</think>'", THINK),
        ("content.split('</think>')[-1]", THINK),
        ("'[THINK]' + block + '[/THINK]'", MISTRAL),
        ("'<|channel>thought\n<channel|>'", GEMMA),
        ("<|start|>assistant<|channel|>final<|message|>", HARMONY),
        ("<|start|>assistant to=user<|message|>", None),
    ],
)
def test_a_template_tells_the_style(template: str, style: Style | None) -> None:
    assert find_style(template, is_token=no_token) == style


def test_a_vocabulary_tells_the_style_where_the_template_does_not() -> None:
    assert find_style("", is_token={"<think>", "</think>"}.__contains__) == TOKENS
    assert find_style("", is_token={"<think>"}.__contains__) is None
    assert find_style("[/THINK]", is_token={"<think>", "</think>"}.__contains__) == MISTRAL


@pytest.mark.parametrize(
    ("style", "prompt", "begun"),
    [
        (THINK, "user: <think>\nassistant: ", ""),
        (THINK, "assistant: <think>\n", "<think>\n"),
        (THINK, "assistant: <think>\n\n</think>\n\n", "</think>\n\n"),
        (THINK, "assistant: </think>", "</think>"),
        (GEMMA, "<|turn>model\n<|channel>thought\n<channel|>", "<channel|>"),
        (HARMONY, "<|start|>user<|message|>a<|end|><|start|>assistant", "<|start|>assistant"),
        (HARMONY, f"<|start|>assistant{FINAL}", f"<|start|>assistant{FINAL}"),
        (HARMONY, "", "<|start|>assistant"),
    ],
)
def test_the_end_of_a_prompt_tells_how_the_reply_begins(style: Style, prompt: str, begun: str) -> None:
    assert style.begun(prompt, "") == begun
    assert style.begun(prompt, "a") == f"{begun}a"


def test_no_header_is_in_what_a_user_has_written_of_a_reply() -> None:
    begun = HARMONY.begun(f"<|start|>assistant{FINAL}", f"a{AGAIN}{ANALYSIS}b")
    assert Told(HARMONY, ["c"], reply=begun).both == ("", "c")
