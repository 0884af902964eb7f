// The page: the conversation of this tab, what the server is doing, and what the buttons do.
import * as chats from "./chats.js";
import { Orchd, Refused, Unreachable, newId } from "./orchd.js";
import { TurnView, atEnd, toEnd } from "./turn.js";

const $ = (id) => document.getElementById(id);
const orchd = () => new Orchd($("url").value, $("token").value);
const say = (text) => { $("live").textContent = text; };  // to screen readers, which would trip over single tokens

let chat = null;      // { id, turns }; see turn.js
let view = null;      // of its last turn
let running = null;   // aborts the answer that is being streamed
let slotIsFree = () => {};  // ends the wait for a full queue

// --- settings -----------------------------------------------------------------------------------------------------------
for (const id of ["url", "system", "priority", "max", "temperature"]) {
  $(id).value = localStorage.getItem(`orchd.${id}`) ?? $(id).value;
  $(id).addEventListener("change", () => localStorage.setItem(`orchd.${id}`, $(id).value));
}
$("remember").checked = localStorage.getItem("orchd.token") !== null;
$("token").value = localStorage.getItem("orchd.token") ?? sessionStorage.getItem("orchd.token") ?? "";
$("token").onchange = $("remember").onchange = () => {
  const [keeps, other] = $("remember").checked ? [localStorage, sessionStorage] : [sessionStorage, localStorage];
  keeps.setItem("orchd.token", $("token").value);
  other.removeItem("orchd.token");
};
$("url").addEventListener("change", look);
$("token").addEventListener("change", look);
$("set").onclick = () => $("settings").showModal();
$("settings").onclose = () => {
  document.activeElement.blur();  // Chromium gives the focus back, but without a caret if a button was clicked
  toPrompt();
  look();
};

document.documentElement.dataset.theme = localStorage.getItem("orchd.theme") ?? "";
$("theme").onclick = () => {
  const now = document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  localStorage.setItem("orchd.theme", document.documentElement.dataset.theme = now === "dark" ? "light" : "dark");
};

// --- the server ---------------------------------------------------------------------------------------------------------
function show(kind, text, trouble = "") {
  $("status").className = kind;
  for (const [id, now] of [["state", text], ["trouble", trouble]])
    if ($(id).textContent !== now) $(id).textContent = $(id).title = now;  // what has not changed is not read out again
  $("trouble").hidden = !trouble;
}

async function look() {
  const server = orchd();
  if (!server.token) return show("", "needs a token");
  try {
    const { status, pools } = await server.health();
    setTokenRejected(false);
    const ids = pools.map((pool) => pool.id);
    if ([...$("pool").options].map((option) => option.value).join() !== ids.join())
      $("pool").replaceChildren(...ids.map((id) => new Option(id, id)));
    $("pools").hidden = ids.length < 2;
    const pool = pools.find((each) => each.id === $("pool").value) ?? pools[0];
    const sum = (what) => pool.replicas.reduce((total, replica) => total + replica[what], 0);
    if (sum("busy") < sum("slots")) slotIsFree();
    const state = { ok: `${sum("busy")} of ${sum("slots")} slots busy`, loading: "loading the model" }[status] ?? status;
    show({ ok: "ok", loading: "loading" }[status] ?? "bad", [pool.model_id, state].filter(Boolean).join(" · "));
  } catch (error) {
    setTokenRejected(error.status === 401);
    show("bad", "not connected", await inWords(error, server));
  }
}

function setTokenRejected(rejected) {
  $("token").setAttribute("aria-invalid", rejected);
  $("token-help").classList.toggle("bad", rejected);
}

/** What went wrong and what to do, in a sentence. */
async function inWords(error, server) {
  if (error instanceof Unreachable)
    return await server.isUp()
      ? `What answers at ${server.url} does not let pages from ${location.origin} in: it is not orchd, or its server.allowed_origins lacks this origin.`
      : `No answer from ${server.url}. Is orchd serve running there?`;
  if (!(error instanceof Refused)) return `This page has failed: ${error.message}`;
  if (error.status === 401) return "The server rejected this token; correct it in Settings.";
  if (error.status === 404) return "The server no longer has this answer: it was restarted, or too much time has passed.";
  const advice = error.message.includes("do not fit") ? " Start a new chat, or lower Max tokens in Settings." : "";
  return `${error.message[0].toUpperCase()}${error.message.slice(1).replace(/\.?$/, ".")}${advice}`;
}

// --- one answer ---------------------------------------------------------------------------------------------------------
/** The conversation as the server wants it; without turns that were never answered, but for the last one. */
function messages() {
  const turns = chat.turns.filter((turn, index) => turn.answer || index === chat.turns.length - 1);
  return [
    ...($("system").value.trim() ? [{ role: "system", content: $("system").value }] : []),
    ...turns.flatMap(({ question, answer }) =>
      [{ role: "user", content: question }, ...(answer ? [{ role: "assistant", content: answer }] : [])]),
  ];
}

/** Submits what the last turn asks. A turn that has an answer already is continued. */
function submit() {
  const turn = chat.turns.at(-1);
  const task = {
    task_id: newId(), priority: $("priority").value, messages: messages(), reasoning: true,
    max_tokens: Number($("max").value), temperature: Number($("temperature").value),
    ...($("pool").options.length > 1 ? { pool_id: $("pool").value } : {}),
  };
  Object.assign(turn, { task, kept: { answer: turn.answer, reasoning: turn.reasoning ?? "" }, note: "", bad: false, complete: false });
  return stream(turn, view);
}

/** Streams the answer of a turn that has a task. After a reload, submitting the same task again takes it up. */
async function stream(turn, view) {
  const stop = running = new AbortController(), server = orchd(), its = chat;
  $("send").hidden = true; $("stop").hidden = false;
  view.begin(); toEnd(); toPrompt(); chats.save(its);
  try {
    await enqueue(server, turn, view, stop.signal);
    const end = await follow(server, turn, view, stop.signal);
    [turn.note, turn.complete] = [summary(end, turn), end.finish_reason === "stop"];
    if (end.error) throw new Refused(500, end.error, null);
    say(`Answer: ${turn.answer.slice(turn.kept.answer.length)}`);
  } catch (error) {
    turn.bad = error.name !== "AbortError";
    turn.note = turn.bad ? await inWords(error, server) : "Stopped.";
    say(turn.note);
  }
  turn.task = null;
  view.end(); chats.save(its);
  if (running === stop) {
    running = null; $("send").hidden = false; $("stop").hidden = true;
    toPrompt();
  }
  look();
}

const duration = (s) => s < 100 ? `${s} s` : s < 6000 ? `${Math.round(s / 60)} min` : `${Math.round(s / 3600)} h`;

async function enqueue(server, turn, view, signal) {
  const onWait = ({ status, waitMs }) => {
    const why = status === 429 ? "The queue is full" : "No model is ready";
    view.countdown(waitMs, (left) => `${why}; next try in ${duration(left)}, or when a slot is free`);
    say(`${why}; waiting.`);
    return new Promise((resolve) => { slotIsFree = resolve; });
  };
  const { queue_position, predicted_start_ms } = await server.submit(turn.task, { signal, onWait });
  const place = queue_position ? `${queue_position} ahead in the queue` : "Next in the queue";
  view.countdown(predicted_start_ms, (left) => left ? `${place} · starts in about ${duration(left)}` : place);
  if (queue_position) say(`${place}.`);
}

async function follow(server, turn, view, signal) {
  const { max_tokens } = turn.task;
  let first = null, end = null;
  const onBroken = () => view.note("The connection broke; reconnecting …");
  Object.assign(turn, turn.kept);  // events come from the start, also after a reload
  for await (const { type, data } of server.follow(turn.task.task_id, { signal, onBroken })) {
    if (type === "started") { view.note("Reading …"); look(); }
    if (type === "prompt") {
      view.note(`Reading, ${data.read} of ${data.total} tokens`);
      view.progress(data.read, data.total);
    }
    if (type === "token") {
      first ??= { at: performance.now(), i: data.i };
      turn.answer += data.t ?? "";
      turn.reasoning += data.r ?? "";
      const speed = 1000 * (data.i - first.i) / (performance.now() - first.at);
      view.note(`${turn.answer ? "" : "Thinking, "}${data.i + 1} of at most ${max_tokens} tokens${data.i - first.i > 8 ? ` · ${Math.round(speed)} tokens/s` : ""}`);
      view.progress(data.i + 1, max_tokens);
      view.paint();
    }
    if (type === "end") end = data;
  }
  return end ?? { finish_reason: "cancelled" };
}

function summary({ tokens_in, tokens_out, decode_ms, finish_reason }, { answer, reasoning }) {
  const stopped = reasoning && !answer ? "reached Max tokens while thinking; raise it in Settings" : "reached Max tokens";
  return [
    tokens_in === undefined ? "" : `${tokens_in} tokens read`,
    tokens_out === undefined ? "" : `${tokens_out} tokens`,
    decode_ms > 0 ? `${Math.round(1000 * tokens_out / decode_ms)} tokens/s` : "",
    { length: stopped, cancelled: "cancelled by the server" }[finish_reason] ?? "",
  ].filter(Boolean).join(" · ");
}

// --- the conversation ---------------------------------------------------------------------------------------------------
function add(turn) {
  view = new TurnView(turn, {
    copy: () => navigator.clipboard.writeText(turn.answer).then(() => say("Copied.")),
    more: () => running || submit(),
    again: () => { if (!running) { turn.answer = turn.reasoning = ""; submit(); } },
  });
  $("log").append(view.root);
}

function open(id) {
  running?.abort();
  running = null;
  chat = chats.find(id) ?? { id: newId(), turns: [] };
  sessionStorage.setItem("orchd.chat", chat.id);
  $("send").hidden = false; $("stop").hidden = true;
  $("log").replaceChildren();
  chat.turns.forEach(add);
  const last = chat.turns.at(-1);
  $("empty").hidden = Boolean(last);
  $("fresh").hidden = !last;
  const earlier = last ? [] : chats.all().slice(0, 5);
  $("earlier").hidden = earlier.length === 0;
  $("earlier").querySelector("ul").replaceChildren(...earlier.map((each) => {
    const [item, button] = [document.createElement("li"), document.createElement("button")];
    Object.assign(button, { type: "button", textContent: each.turns[0]?.question ?? "", onclick: () => open(each.id) });
    item.append(button);
    return item;
  }));
  toEnd(); toPrompt();
  if (last?.task) stream(last, view);
}

function ask(question) {
  if (chat.turns.at(-1)?.answer === "") { chat.turns.pop(); $("log").lastElementChild.remove(); }  // it came to nothing
  const turn = { question, answer: "" };
  chat.turns.push(turn);
  $("empty").hidden = true; $("fresh").hidden = false;
  add(turn);
  submit();
}

/** Puts the focus back where it was lost; not on touch screens, where a keyboard would come up. */
function toPrompt() {
  const has = document.activeElement, lost = has === document.body || !has.checkVisibility();
  if (lost && matchMedia("(pointer: fine)").matches) $("prompt").focus({ preventScroll: true });
}

$("form").onsubmit = (event) => {
  event.preventDefault();
  const question = $("prompt").value.trim();
  if (running || !question) return;
  if (!$("token").value.trim()) return $("settings").showModal();
  $("prompt").value = ""; keepDraft();
  ask(question);
};
function keepDraft() {
  sessionStorage.setItem("orchd.draft", $("prompt").value);
  if (CSS.supports("field-sizing", "content")) return;
  $("prompt").style.height = "auto";
  $("prompt").style.height = `${$("prompt").scrollHeight}px`;
}
$("prompt").value = sessionStorage.getItem("orchd.draft") ?? "";
$("prompt").oninput = keepDraft;
$("prompt").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); $("form").requestSubmit(); }
};
$("stop").onclick = () => running?.abort();
addEventListener("keydown", (event) => { if (event.key === "Escape" && !$("settings").open) running?.abort(); });
$("fresh").onclick = () => open(null);
$("forget").onclick = () => { chats.forget(); open(null); };
for (const button of $("ideas").children)
  button.onclick = () => { $("prompt").value = button.textContent; $("form").requestSubmit(); };
$("down").onclick = toEnd;
addEventListener("scroll", () => { $("down").hidden = atEnd() || !chat.turns.length; }, { passive: true });
addEventListener("pagehide", () => { if (running) chats.save(chat); });  // what there is of the answer
addEventListener("storage", (event) => { if (event.key === chats.keyOf(chat) && !running) open(chat.id); });  // another tab

open(sessionStorage.getItem("orchd.chat"));
look();
setInterval(() => document.hidden || look(), 3000);
if (!$("token").value) $("settings").showModal();
