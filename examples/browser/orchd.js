// orchd's two data routes for a browser, without packages. Copy it into a page of your own:
//
//     const orchd = new Orchd("http://127.0.0.1:8737", token);
//     const { task_id } = await orchd.submit({ task_id: newId(), prompt: "Once upon a time" });
//     for await (const event of orchd.follow(task_id)) if (event.type === "token") show(event.data.t);
//
// It uses `fetch` and not `EventSource`: the token stays in a header, comments with the progress can be read, and a
// broken connection is taken up again at once, before the server's grace for a task without listeners is over.

const SILENCE_MS = 40_000;  // the server sends at least a comment every 15 s
const RESUME_MS = [0, 500, 1000, 2000, 2000, 5000, 5000, 5000];

/** The server said no. `waitMs`: how long to wait before the next try; null if trying again would not help. */
export class Refused extends Error {
  constructor(status, { code, message }, waitMs) {
    super(message);
    Object.assign(this, { name: "Refused", status, code, waitMs });
  }

  static async from(answer) {
    const said = (name) => answer.headers.get(name) === null ? null : Number(answer.headers.get(name));
    const waitMs = said("X-Backoff-Ms") ?? (said("Retry-After") === null ? null : 1000 * said("Retry-After"));
    const envelope = await answer.json().catch(() => null);
    return new Refused(answer.status, envelope?.code ? envelope : notOrchd(answer), waitMs);
  }
}

/** No answer, or a connection that broke and could not be taken up again. */
export class Unreachable extends Error {}

export class Orchd {
  constructor(url, token) {
    this.url = url.trim().replace(/\/+$/, "");
    this.token = token.trim();
  }

  /** The body of `GET /health`; a server that is still loading is an answer, not an error. */
  async health() {
    const answer = await this.#fetch("/health", { signal: AbortSignal.timeout(10_000) });
    const body = await answer.clone().json().catch(() => null);
    if (body?.pools) return body;
    throw await Refused.from(answer);
  }

  /**
   * Submits a task with a `task_id` of the caller's, and waits as long as the server says while it has no room; `onWait`
   * is told so, and may return a promise that ends this wait earlier.
   */
  async submit(task, { signal, onWait } = {}) {
    for (;;) {
      const posted = this.#fetch("/v1/tasks", { method: "POST", body: JSON.stringify(task) });
      // The request itself is not aborted: the server may have accepted the task, and then it must be cancelled.
      const answer = await Promise.race([posted, aborted(signal)]).catch((error) => {
        posted.then((late) => late.status === 202 && this.#cancel(task.task_id), () => {});
        throw error;
      });
      if (answer.status === 202) return answer.json();
      const refused = await Refused.from(answer);
      if (refused.waitMs === null) throw refused;
      const early = onWait?.(refused);
      await Promise.race([pause(refused.waitMs, signal), ...(early ? [early] : [])]);
    }
  }

  /**
   * Yields a task's events from the first to its `end`, each once, as `{ id, type, data }`; also, without an id,
   * `{ type: "prompt", data: { read, total } }` while a long prompt is read. Leaving the loop cancels the task.
   */
  async *follow(taskId, { signal, onBroken } = {}) {
    let last = null, tries = 0;
    for (;;) {
      try {
        const headers = last === null ? {} : { "Last-Event-ID": last };
        const answer = await this.#fetch(`/v1/tasks/${taskId}/stream`, { signal, headers });
        if (answer.status === 204) return;  // it was the end already
        if (answer.status !== 200) throw await Refused.from(answer);
        for await (const event of events(answer.body)) {
          tries = 0;
          last = event.id ?? last;
          yield event;
          if (event.type === "end") return;
        }
        throw new Unreachable("the stream ended before the task did");
      } catch (error) {
        if (signal?.aborted) this.#cancel(taskId);
        if (!(error instanceof Unreachable) || tries === RESUME_MS.length) throw error;
        onBroken?.(tries);
        await pause(RESUME_MS[tries++], signal);
      }
    }
  }

  /** Whether anything answers at this address, even if it does not let this page read the answer. */
  async isUp() {
    return fetch(`${this.url}/health`, { mode: "no-cors", signal: AbortSignal.timeout(5000) }).then(() => true, () => false);
  }

  // A listener that grants the task no time after it has left: the slot is free at once, not after the server's grace for
  // broken connections. It also ends a task that nobody has listened to yet, which would run to its end.
  #cancel(taskId) {
    this.#fetch(`/v1/tasks/${taskId}/stream?cancel_grace_s=0`, {}).then((answer) => answer.body?.cancel(), () => {});
  }

  async #fetch(path, { headers, ...options }) {
    try {
      return await fetch(this.url + path, { ...options, headers: { Authorization: `Bearer ${this.token}`, ...headers } });
    } catch (error) {
      throw options.signal?.aborted && error.name === "AbortError" ? error : new Unreachable(error.message);
    }
  }
}

/** A UUID. `crypto.randomUUID` exists on https and loopback pages only. */
export function newId() {
  return crypto.randomUUID?.() ?? "10000000-1000-4000-8000-100000000000".replace(/[018]/g, (c) =>
    (+c ^ (crypto.getRandomValues(new Uint8Array(1))[0] & (15 >> (+c / 4)))).toString(16));
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await read(reader);
      if (done) return;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const event = parse(block);
        if (event) yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});  // closes the connection if the loop was left
  }
}

async function read(reader) {
  const silence = new AbortController();
  try {
    return await Promise.race([
      reader.read(),
      pause(SILENCE_MS, silence.signal).then(() => Promise.reject(new Unreachable("the connection fell silent"))),
    ]);
  } catch (error) {
    throw error.name === "AbortError" || error instanceof Unreachable ? error : new Unreachable(error.message);
  } finally {
    silence.abort();
  }
}

function parse(block) {
  const progress = /^: prompt (\d+)\/(\d+)$/.exec(block);
  if (progress) return { type: "prompt", data: { read: Number(progress[1]), total: Number(progress[2]) } };
  const fields = Object.fromEntries(block.split("\n").map((line) => line.split(/: (.*)/s)));
  return fields.event ? { id: fields.id, type: fields.event, data: JSON.parse(fields.data) } : null;
}

const notOrchd = (answer) => ({ code: "", message: `what answers there is not orchd (status ${answer.status})` });

const aborted = (signal) => new Promise((_, reject) => {
  if (signal?.aborted) reject(signal.reason);
  signal?.addEventListener("abort", () => reject(signal.reason), { once: true });
});

const pause = (ms, signal) => new Promise((resolve, reject) => {
  signal?.throwIfAborted();
  const leave = () => { clearTimeout(timer); reject(signal.reason); };
  const timer = setTimeout(() => { signal?.removeEventListener("abort", leave); resolve(); }, ms);
  signal?.addEventListener("abort", leave, { once: true });
});
