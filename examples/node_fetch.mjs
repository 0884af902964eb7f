// Asks a question from Node 18 or newer, without packages.
//
//     node examples/node_fetch.mjs "Name three rivers."
import { readFile } from "node:fs/promises";
import { homedir } from "node:os";

const url = process.env.ORCHD_URL ?? "http://127.0.0.1:8737";
const tokenFile = `${process.env.XDG_STATE_HOME ?? `${homedir()}/.local/state`}/orchd/token`;
const token = process.env.ORCHD_TOKEN ?? (await readFile(tokenFile, "utf8").catch(() =>
  quit(`no token in ${tokenFile}; start the server once with \`orchd serve\`, or set ORCHD_TOKEN`))).trim();
const headers = { Authorization: `Bearer ${token}` };

function quit(sentence) {
  console.error(sentence);
  process.exit(1);
}

/** The error envelope as a sentence: always code, message, engine. */
async function refusal(answer) {
  const { code, message } = await answer.json().catch(() => ({}));
  return code ? `${code}: ${message}` : `${url} does not answer like orchd (status ${answer.status})`;
}

async function submit(task) {
  for (;;) {
    const answer = await fetch(`${url}/v1/tasks`, { method: "POST", headers, body: JSON.stringify(task) });
    if (answer.status === 202) return answer.json();
    const sentence = await refusal(answer);
    if (answer.status !== 429) throw new Error(sentence);
    console.error(sentence);
    // The queue is full; the server says how long to wait.
    await new Promise((resolve) => setTimeout(resolve, Number(answer.headers.get("X-Backoff-Ms"))));
  }
}

async function* follow(taskId) {
  const answer = await fetch(`${url}/v1/tasks/${taskId}/stream`, { headers });
  if (answer.status !== 200) throw new Error(await refusal(answer));
  let rest = "";
  for await (const chunk of answer.body.pipeThrough(new TextDecoderStream())) {
    const blocks = (rest + chunk).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const fields = Object.fromEntries(block.split("\n").map((line) => line.split(/: (.*)/s)));
      if (fields.event) yield { id: Number(fields.id), type: fields.event, data: JSON.parse(fields.data) };
    }
  }
}

async function main(question) {
  const { task_id } = await submit({ messages: [{ role: "user", content: question }], max_tokens: 64 });
  for await (const event of follow(task_id)) {
    if (event.type === "token") process.stdout.write(event.data.t);
    if (event.type === "end") {
      console.log(`\n[${event.data.finish_reason}, ${event.data.tokens_out} tokens]`);
      return event.data.error?.message;
    }
  }
  return "the stream ended before the task did";
}

// A failed fetch says why in its cause; a connection that was made and broke has none of these codes.
const unreachable = ["ECONNREFUSED", "ENOTFOUND", "EHOSTUNREACH", "UND_ERR_CONNECT_TIMEOUT"];
try {
  const sentence = await main(process.argv.slice(2).join(" ") || "Name three rivers.");
  if (sentence) quit(sentence);
} catch (error) {
  const code = error.cause?.code ?? error.cause?.message;
  quit(unreachable.includes(code) ? `no answer from ${url} (${code}); is \`orchd serve\` running there?`
    : code ? `the connection to ${url} failed: ${code}` : error.message);
}
