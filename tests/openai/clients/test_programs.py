"""Programs that people have: each with the lines of the documentation, and with what they do besides.

They are real and so is the bridge; the server is a stand-in whose model calls a function before it replies.
"""

from __future__ import annotations

import json
import shutil

import pytest

from testkit.scripted_model import REPLY
from tests.openai.clients.conftest import CLIENTS, Programs, example

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CLIENTS / "bin").is_dir(), reason="needs the clients: make test-openai"),
]
needs_node = pytest.mark.skipif(
    shutil.which("node") is None or not (CLIENTS / "node_modules" / "zod").is_dir(),
    reason="needs Node.js and npm, and then: make test-openai",
)

RIVER = "name='Rhine' length_km=1"

TOOL = {"type": "function", "function": {"name": "level", "parameters": {"properties": {"river": {"type": "string"}}}}}


@pytest.mark.parametrize(
    ("program", "written"),
    [
        ("sdk.py", REPLY),
        ("sdk_parse.py", RIVER),
        ("langchain_agent.py", REPLY),
        ("instructor_river.py", RIVER),
        ("pydantic_agent.py", RIVER),
    ],
)
def test_the_lines_of_the_documentation(programs: Programs, program: str, written: str) -> None:
    assert programs.python(example(program)).strip() == written


@needs_node
@pytest.mark.parametrize(
    ("program", "written"), [("sdk.mjs", REPLY), ("sdk_parse.mjs", "{ name: 'Rhine', length_km: 1 }")]
)
def test_the_lines_for_node(programs: Programs, program: str, written: str) -> None:
    assert programs.node(example(program).read_text()).strip() == written


def test_the_sdk_at_large(programs: Programs) -> None:
    """Sync and async, streamed and not, usage, tools, and the errors it knows."""
    program = f"""
import asyncio, openai
from openai import AsyncOpenAI, OpenAI
client = OpenAI()
ask = dict(model="default", messages=[dict(role="user", content="hi")])
assert [model.id for model in client.models.list()] == ["tiny-llama", "default"]

whole = client.chat.completions.create(**ask, n=2)
assert [choice.message.content for choice in whole.choices] == [{REPLY!r}] * 2
assert whole.usage.prompt_tokens == 20 and whole.usage.prompt_tokens_details.cached_tokens == 5

with client.chat.completions.stream(**ask, tools=[{TOOL!r}], stream_options=dict(include_usage=True)) as stream:
    kinds = [event.type for event in stream]
    final = stream.get_final_completion()
assert "tool_calls.function.arguments.delta" in kinds and "tool_calls.function.arguments.done" in kinds, kinds
[call] = final.choices[0].message.tool_calls
assert (call.function.name, call.function.arguments) == ("level", '{{"river":"Rhine"}}')
assert final.usage.total_tokens > 20
ask["messages"] += [final.choices[0].message.to_dict(), dict(role="tool", tool_call_id=call.id, content="2 m")]
assert client.chat.completions.create(**ask, tools=[{TOOL!r}]).choices[0].message.content == {REPLY!r}

text = client.completions.create(model="tiny-llama", prompt="the", stream=True)
assert "".join(chunk.choices[0].text for chunk in text) == {REPLY!r}

async def concurrently():
    async with AsyncOpenAI() as client:
        streams = [await client.chat.completions.create(**ask, stream=True) for _ in range(8)]
        return [[chunk.choices[0].delta.content async for chunk in stream] for stream in streams]
assert all("".join(filter(None, pieces)) == {REPLY!r} for pieces in asyncio.run(concurrently()))

for error, call in [
    (openai.NotFoundError, lambda: client.chat.completions.create(**ask | dict(model="gpt-4o"))),
    (openai.BadRequestError, lambda: client.chat.completions.create(**ask, logprobs=True)),
    (openai.BadRequestError, lambda: client.embeddings.create(model="default", input="hi")),
    (openai.BadRequestError, lambda: client.images.generate(model="default", prompt="hi")),
    (openai.AuthenticationError, lambda: OpenAI(api_key="not-the-token-0123456789").models.list()),
]:
    try:
        call()
    except error as raised:
        assert raised.body["message"] and raised.body["type"], raised.body
    else:
        raise SystemExit(f"no {{error}}")
"""
    programs.python("-c", program)


@needs_node
def test_node_at_large(programs: Programs) -> None:
    program = f"""
import assert from "node:assert";
import OpenAI from "openai";
const client = new OpenAI();
const messages = [{{ role: "user", content: "hi" }}];
const whole = await client.chat.completions.create({{ model: "default", messages }});
assert.equal(whole.choices[0].message.content, {json.dumps(REPLY)});
assert.equal(whole.usage.prompt_tokens, 20);
const runner = client.chat.completions.runTools({{
  model: "default", messages, stream: true,
  tools: [{{ type: "function", function: {{
    name: "level", parse: JSON.parse, function: (args) => `${{args.river}}: 2 m`,
    parameters: {{ type: "object", properties: {{ river: {{ type: "string" }} }} }} }} }}],
}});
assert.equal(await runner.finalContent(), {json.dumps(REPLY)});
assert.equal(runner.messages.find((message) => message.role === "tool").content, "Rhine: 2 m");
await assert.rejects(client.chat.completions.create({{ model: "gpt-4o", messages }}), OpenAI.NotFoundError);
"""
    programs.node(program)


def test_langchain_chats_and_structures(programs: Programs) -> None:
    program = f"""
from langchain_openai import ChatOpenAI
from pydantic import BaseModel
class River(BaseModel):
    name: str
    length_km: int
model = ChatOpenAI(model="default")
answer = model.invoke("hi")
assert answer.content == {REPLY!r} and answer.usage_metadata["input_tokens"] == 20
pieces = list(model.stream("hi"))
assert "".join(piece.text for piece in pieces) == {REPLY!r} and len(pieces) > 3
for method in ("json_schema", "function_calling"):
    assert model.with_structured_output(River, method=method).invoke("hi") == River(name="Rhine", length_km=1), method
"""
    programs.python("-c", program)


def test_pydantic_ai_calls_functions_and_streams(programs: Programs) -> None:
    program = f"""
import asyncio
from pydantic_ai import Agent
agent = Agent("openai-chat:default", system_prompt="Be brief.")
asked = []
@agent.tool_plain
def level(river: str) -> str:
    "The level of a river."
    asked.append(river)
    return "2 m"
assert agent.run_sync("hi").output == {REPLY!r}
assert asked == ["Rhine"]
async def stream():
    async with agent.run_stream("hi") as result:
        return [piece async for piece in result.stream_text(delta=True, debounce_by=None)]
assert "".join(asyncio.run(stream())) == {REPLY!r}
"""
    programs.python("-c", program)


def test_llm_with_an_openai_compatible_endpoint(programs: Programs) -> None:
    model = {
        "model_id": "orchd",
        "model_name": "default",
        "api_base": programs.env["OPENAI_BASE_URL"],
        "api_key_name": "orchd",
    }
    folder = programs.tool("llm", "logs", "path").strip().rpartition("/")[0]
    with open(f"{folder}/extra-openai-models.yaml", "w") as file:
        json.dump([model], file)  # every JSON is YAML
    programs.tool("llm", "keys", "set", "orchd", "--value", programs.env["OPENAI_API_KEY"])
    for options in ([], ["--no-stream"]):
        assert programs.tool("llm", "-m", "orchd", *options, "hi").strip() == REPLY
