// For a browser's console, on a page from this machine (http://localhost:... or http://127.0.0.1:...): pages from other
// origins are refused. Paste all of it, then:
//
//     orchd.token = "…"                            // cat ~/.local/state/orchd/token
//     await orchd.ask("Name three rivers.")        // EventSource: reconnects by itself
//     await orchd.askWithFetch("Name three rivers.")
globalThis.orchd = {
  url: "http://127.0.0.1:8737",
  token: "",

  async submit(task) {
    const answer = await fetch(`${this.url}/v1/tasks`, {
      method: "POST",
      headers: { Authorization: `Bearer ${this.token}`, "Content-Type": "application/json" },
      body: JSON.stringify(task),
    }).catch(() => {
      throw new Error(`no answer from ${this.url} that this page may read; is orchd serve running there?`);
    });
    const body = await answer.json();
    if (!answer.ok) throw new Error(`${body.code}: ${body.message}`);
    return body.task_id;
  },

  // EventSource cannot set a header, so this one route accepts the token in its URL. It resumes by itself with
  // Last-Event-ID. Close it at `end`, or the browser reconnects once more and gets a 204 (no more events).
  async ask(content, options = {}) {
    const id = await this.submit({ messages: [{ role: "user", content }], max_tokens: 128, ...options });
    const stream = new EventSource(`${this.url}/v1/tasks/${id}/stream?access_token=${encodeURIComponent(this.token)}`);
    return new Promise((resolve, reject) => {
      let text = "";
      stream.addEventListener("token", (event) => (text += JSON.parse(event.data).t));
      stream.addEventListener("end", (event) => {
        stream.close();
        resolve({ text, ...JSON.parse(event.data) });
      });
      stream.onerror = () => {
        if (stream.readyState === EventSource.CLOSED) reject(new Error("the server refused the stream"));
      };
    });
  },

  // fetch keeps the token in a header. Pass a signal to stop: the task is cancelled when it has no listeners.
  async askWithFetch(content, { signal, onText = console.log, ...options } = {}) {
    const id = await this.submit({ messages: [{ role: "user", content }], max_tokens: 128, ...options });
    const headers = { Authorization: `Bearer ${this.token}` };
    const answer = await fetch(`${this.url}/v1/tasks/${id}/stream`, { headers, signal });
    if (answer.status !== 200) throw new Error(`the stream returned status ${answer.status}`);
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let text = "", rest = ""; ; ) {
      const { value, done } = await reader.read();
      if (done) throw new Error("the connection broke; fetch again with Last-Event-ID to resume");
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const type = /^event: (.*)$/m.exec(block)?.[1];
        const data = /^data: (.*)$/m.exec(block)?.[1];
        if (type === "token") {
          const piece = JSON.parse(data).t;
          text += piece;
          onText(piece);
        }
        if (type === "end") return { text, ...JSON.parse(data) };
      }
    }
  },
};
