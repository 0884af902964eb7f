// One question and its answer on the page. As data it is
//
//     { question, answer,      // what there is of it
//       note, bad, complete,   // how it ended: a line, whether that is an error, whether the model had finished
//       task, kept }           // while it is being answered: what was submitted, what the answer was before
const template = document.getElementById("turn");

export const atEnd = () => innerHeight + scrollY > document.documentElement.scrollHeight - 120;
export const toEnd = () => scrollTo({ top: document.documentElement.scrollHeight });

export class TurnView {
  #shown = "";
  #frame = 0;
  #ticker = 0;

  /** `on` has what its three buttons do. */
  constructor(turn, on) {
    this.turn = turn;
    this.root = template.content.cloneNode(true).firstElementChild;
    const part = (name) => this.root.querySelector(name);
    [this.answer, this.bar, this.line] = [part(".answer"), part("progress"), part(".note")];
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
    const { answer } = this.turn;
    if (!answer.startsWith(this.#shown)) this.answer.textContent = this.#shown = "";
    this.answer.append(answer.slice(this.#shown.length));
    this.#shown = answer;
  }
}
