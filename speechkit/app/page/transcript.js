// What was said: the model of it, and its place on the page.

export const UNSURE = 0.6; // a word below this confidence is marked

/** Segments {text, stable, final, words}, times in seconds of the tape, over one stream after the other. */
export class Transcript {
  segments = [];
  #base = 0;
  #offset = 0;

  /** The next stream begins at `offset` seconds of the tape. */
  begin(offset) {
    this.#base = this.segments.length;
    this.#offset = offset;
  }

  /** Take in a `text` message; returns the index of the segment it changed. */
  apply({ segment, text, stable, final, words }) {
    const index = this.#base + segment;
    const moved = words.map((word) => ({ ...word, start: word.start + this.#offset, end: word.end + this.#offset }));
    for (let gap = this.segments.length; gap < index; gap++) this.segments[gap] = nothing();
    this.segments[index] = { text, stable, final, words: moved };
    return index;
  }

  /** No message will come any more: what was shown last stays. Returns the index of the segment that closed, or -1. */
  close() {
    const index = this.segments.findLastIndex(({ final }) => !final);
    if (index >= 0) this.segments[index] = { ...this.segments[index], final: true };
    return index;
  }

  /** Segments that say something. */
  get spoken() {
    return this.segments.filter(({ text }) => text);
  }
}

const nothing = () => ({ text: "", stable: "", final: true, words: [] });

/** Words with the text in front of each, and what follows the last; null where the words are not those of the text. */
export function pieces({ text, stable, final, words }) {
  let at = 0;
  const found = words.map((word) => {
    const from = text.indexOf(word.word, at);
    const piece = { word, before: text.slice(at, from), from };
    at = from + word.word.length;
    return { ...piece, sure: final ? "final" : at <= stable.length ? "stable" : "partial" };
  });
  return found.some(({ from }) => from < 0) || !found.length ? null : { found, after: text.slice(at) };
}

/** Keeps `root` like a transcript: a paragraph for each segment, in it a span for each word. */
export class TranscriptView {
  #root;
  #current = null; // the word that Tab reaches

  /** `replay` is called with a word, {start, end}, that was clicked or chosen by key. */
  constructor(root, { replay }) {
    this.#root = root;
    root.addEventListener("click", ({ target }) => {
      const word = target.closest(".word");
      if (!word || !getSelection().isCollapsed) return; // somebody marks text to copy it
      this.#focus(word);
      replay(word.said, word);
    });
    root.addEventListener("keydown", (event) => this.#key(event, replay));
  }

  clear() {
    this.#root.replaceChildren();
    this.#current = null;
  }

  update(index, segment) {
    const paragraph = this.#root.querySelector(`[data-segment="${index}"]`) ?? this.#paragraph(index);
    paragraph.hidden = !segment.text;
    const [time, said] = paragraph.children;
    time.textContent = segment.words.length ? minutes(segment.words[0].start) : "";
    const parts = pieces(segment);
    if (parts) fill(said, parts);
    else said.replaceChildren(span({ text: segment.text, className: segment.final ? "final" : "partial" }));
    if (!this.#current?.isConnected) this.#current = null;
    if (!this.#current && parts) this.#reach(said.querySelector(".word"));
  }

  #paragraph(index) {
    const paragraph = document.createElement("p");
    paragraph.dataset.segment = index;
    paragraph.append(span({ className: "time" }), span({ className: "said" }));
    this.#root.append(paragraph);
    return paragraph;
  }

  #key(event, replay) {
    const words = [...this.#root.querySelectorAll(".word")];
    const at = words.indexOf(this.#current);
    const moves = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: words.length - 1 };
    if (at < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key in moves) this.#focus(words[Math.max(0, Math.min(words.length - 1, moves[event.key]))]);
    else if (event.key === "Enter" || event.key === " ") replay(words[at].said, words[at]);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  #reach(word) {
    if (this.#current) this.#current.tabIndex = -1;
    this.#current = word;
    word.tabIndex = 0;
  }

  #focus(word) {
    this.#reach(word);
    word.focus();
  }
}

/** Put words into an element, leaving those that stay: what is focused or playing must not go away under the reader. */
function fill(said, { found, after }) {
  if (said.firstElementChild && !said.firstElementChild.said) said.replaceChildren(); // text without words stood here
  while (said.children.length > found.length) said.lastElementChild.remove();
  while (said.lastChild && !said.lastChild.said) said.lastChild.remove();
  found.forEach(({ word, before, sure }, at) => {
    if (!said.children[at]) said.append(before, span({ role: "button", tabIndex: -1 }));
    const node = said.children[at];
    node.previousSibling.data = before;
    mark(node, word, sure);
  });
  said.append(after);
}

function mark(node, word, sure) {
  if (node.textContent !== word.word) node.textContent = word.word;
  node.classList.add("word");
  node.classList.toggle("unsure", word.confidence < UNSURE);
  for (const name of ["stable", "partial"]) node.classList.toggle(name, sure === name);
  node.title = `${minutes(word.start)} · ${Math.round(100 * word.confidence)} % sure`;
  node.said = word;
}

function span({ text = "", className = "", ...rest }) {
  return Object.assign(document.createElement("span"), { textContent: text, className, ...rest });
}

/** 75.4 as "1:15", 3675 as "1:01:15". */
export function minutes(seconds) {
  const whole = Math.floor(seconds);
  const two = (value) => String(value % 60).padStart(2, "0");
  const [hours, most] = [Math.floor(whole / 3600), Math.floor(whole / 60)];
  return hours ? `${hours}:${two(most)}:${two(whole)}` : `${most}:${two(whole)}`;
}
