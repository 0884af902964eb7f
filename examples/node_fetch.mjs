// Asks a question from Node 18 or newer, without packages.
//
//     node examples/node_fetch.mjs "Name three rivers."
import { readFile } from "node:fs/promises";
import { homedir } from "node:os";

const url = process.env.ORCHD_URL ?? "http://127.0.0.1:8737";
const state = process.env.XDG_STATE_HOME ?? `${homedir()}/.local/state`;
const token = process.env.ORCHD_TOKEN ?? (await readFile(`${state}/orchd/token`, "utf8")).trim();
const headers = { Authorization: `Bearer ${token}` };

async function submit(task) {
  for (;;) {
    const answer = await fetch(`${url}/v1/tasks`, { method: "POST", headers, body: JSON.stringify(task) });
    const body = await answer.json();
    if (answer.status === 202) return body;
    if (answer.status !== 429) throw new Error(`${body.code}: ${body.message}`);
    // The queue is full; the server says how long to wait.
    await new Promise((resolve) => setTimeout(resolve, Number(answer.headers.get("X-Backoff-Ms"))));
  }
}

async function* follow(taskId) {
  const answer = await fetch(`${url}/v1/tasks/${taskId}/stream`, { headers });
  if (answer.status !== 200) throw new Error(`the stream returned status ${answer.status}`);
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
      if (event.data.error) throw new Error(event.data.error.message);
    }
  }
}

main(process.argv.slice(2).join(" ") || "Name three rivers.").catch((error) => {
  console.error(error.message);
  process.exitCode = 1;
});
