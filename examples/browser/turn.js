// One question and its answer on the page. As data it is
//
//     { question, answer,      // what there is of it
//       reasoning,             // what the model thought before, which is no part of the conversation
//       note, bad, complete,   // how it ended: a line, whether that is an error, whether the model had finished
//       task, kept }           // while it is being answered: what was submitted, and what there was of the answer before
const template = document.getElementById("turn");

export const atEnd = () => innerHeight + scrollY > document.documentElement.scrollHeight - 120;
export const toEnd = () => scrollTo({ top: document.documentElement.scrollHeight });

export class TurnView {
  #shown = new Map();
  #frame = 0;
  #ticker = 0;

  /** `on` has what its three buttons do. */
  constructor(turn, on) {
    this.turn = turn;
    this.root = template.content.cloneNode(true).firstElementChild;
    const part = (name) => this.root.querySelector(name);
    [this.answer, this.bar, this.line] = [part(".answer"), part("progress"), part(".note")];
    [this.thoughts, this.reasoning] = [part(".thoughts"), part(".reasoning")];
    part(".question").textContent = turn.question;
    for (const name of ["copy", "more", "again"]) part(`.${name}`).onclick = on[name];
    this.#draw();
    this.end();
  }

  /** While it is being answered. */
  begin() {
    this.root.classList.add("working");
    this.root.setAttribute("aria-busy", "true");
    this.answer.classList.add("streaming");
    this.progress();
  }

  /** Shows the turn as it was left. */
  end() {
    cancelAnimationFrame(this.#frame);
    this.#draw();
    this.root.classList.remove("working");
    this.root.removeAttribute("aria-busy");
    this.answer.classList.remove("streaming");
    this.bar.hidden = true;
    this.note(this.turn.note ?? "");
    this.line.classList.toggle("bad", Boolean(this.turn.bad));
    this.root.querySelector(".copy").hidden = !this.turn.answer || !navigator.clipboard;
    this.root.querySelector(".more").hidden = !this.turn.answer || this.turn.complete;
  }

  /** The answer has changed; it is drawn once a frame, however fast tokens come. */
  paint() {
    this.#frame ||= requestAnimationFrame(() => {
      const follows = atEnd();
      this.#draw();
      if (follows) toEnd();
    });
  }

  note(line) {
    clearInterval(this.#ticker);
    if (this.line.textContent !== line) this.line.textContent = line;
  }

  /** A line that says how many seconds are left, counted down. */
  countdown(ms, line) {
    const end = performance.now() + ms;
    const left = () => Math.max(0, Math.ceil((end - performance.now()) / 1000));
    this.note(line(left()));
    this.#ticker = setInterval(() => { this.line.textContent = line(left()); }, 250);
  }

  /** How far it is; without figures, that it goes on. */
  progress(value, max) {
    this.bar.hidden = false;
    if (value === undefined) return this.bar.removeAttribute("value");
    [this.bar.max, this.bar.value] = [max, value];
  }

  #draw() {
    this.#frame = 0;
    const { answer, reasoning = "", task } = this.turn;
    this.#write(this.reasoning, reasoning);
    this.#write(this.answer, answer);
    this.thoughts.hidden = !reasoning;
    const label = task && !answer ? "Thinking …" : "What the model thought";
    if (this.thoughts.firstChild.textContent !== label) this.thoughts.firstChild.textContent = label;
  }

  #write(element, text) {
    let shown = this.#shown.get(element) ?? "";
    if (!text.startsWith(shown)) element.textContent = shown = "";
    element.append(text.slice(shown.length));
    this.#shown.set(element, text);
  }
}
