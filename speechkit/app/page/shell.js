// What is around the text: button, status, notices, files, theme and keys.

import { toJSON, toSRT, toText, toVTT } from "./exports.js";

const $ = (id) => document.getElementById(id);
const FORMATS = {
  txt: [toText, "text/plain"],
  srt: [toSRT, "application/x-subrip"],
  vtt: [toVTT, "text/vtt"],
  json: [toJSON, "application/json"],
};
const BUTTONS = {
  idle: "Start listening",
  asking: "Start listening",
  listening: "Stop listening",
  reading: "Stop reading",
  stopping: "Stopping",
};
const LOWEST_DB = -60;
const ANNOUNCED = 3; // final segments kept for screen readers, and away from the browser's search

export function recall(name) {
  try {
    return localStorage.getItem(name);
  } catch {
    return null; // storage is forbidden: nothing is remembered
  }
}

export function remember(name, value) {
  try {
    if (value) localStorage.setItem(name, value);
    else localStorage.removeItem(name);
  } catch {
    // storage is forbidden: nothing is remembered
  }
}

/** `on` has toggle, read(file), token(text), clear, escape, theme(name), device, segments() and about(). */
export class Shell {
  canvas = $("picture");
  text = $("text");
  #on;
  #state = "idle";
  #unsaved = false;
  #db = LOWEST_DB;
  #lock = null;

  constructor(on) {
    this.#on = on;
    this.#controls();
    this.#exports();
    this.#dialogs();
    this.#drops();
    document.addEventListener("keydown", (event) => this.#key(event));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.applyTheme());
    addEventListener("beforeunload", (event) => this.#unsaved && event.preventDefault());
  }

  get device() {
    return $("device").value;
  }

  /** A state of idle, asking, listening, reading and stopping, with its words. */
  enter(state, words) {
    this.#state = document.body.dataset.state = state;
    $("record").setAttribute("aria-label", BUTTONS[state]);
    $("open").disabled = state !== "idle";
    $("progress").hidden = state !== "reading";
    if (state !== "idle") this.#quiet();
    if (state === "reading") this.progress(0);
    if (state === "idle") this.#lock?.release().catch(() => {});
    if (state !== "listening") this.#showLevel(LOWEST_DB);
    this.say(words);
  }

  /** The status line; `mood` is "lost" while the connection is. */
  say(words, mood = "") {
    $("status").textContent = words;
    document.body.dataset.mood = mood;
  }

  /** A notice that stays until the next start. */
  fail(words) {
    $("trouble").textContent = words;
  }

  askToken() {
    $("password").hidden = false;
    $("token").focus();
  }

  showModel({ model, search }) {
    $("model").textContent = model;
    $("model").title = search;
  }

  showNumbers({ heard, latency, factor }) {
    $("numbers").hidden = false;
    $("heard").textContent = heard;
    $("latency").textContent = `${Math.round(latency)} ms`;
    $("latency").parentElement.hidden = latency === null;
    $("factor").textContent = factor.toFixed(factor < 0.1 ? 3 : 2);
  }

  progress(part) {
    $("progress").value = part;
  }

  /** Show how loud `samples` are; returns their peak. */
  meter(samples) {
    const energy = samples.reduce((sum, x) => sum + x * x, 0) / samples.length;
    this.#showLevel(Math.max(10 * Math.log10(energy + 1e-12), this.#db - 2)); // falls more slowly than it rises
    return samples.reduce((most, x) => Math.max(most, Math.abs(x)), 0);
  }

  /** A segment has changed: tell it once it is final, and keep the end in sight of those who read there. */
  follow({ text, final }) {
    if (!text) return;
    $("invitation").hidden = true;
    $("tools").hidden = false;
    this.#unsaved = true;
    if (final) this.#announce(text);
    const { scrollHeight } = document.documentElement;
    if (scrollHeight - scrollY - innerHeight < 240) scrollTo({ top: scrollHeight });
  }

  /** Names of microphones are known once one was allowed; `chosen` is the id remembered from last time. */
  showDevices(devices, chosen) {
    const current = $("device").value || chosen;
    $("device").length = 1;
    $("device").append(...devices.map(({ id, name }) => new Option(name, id, false, id === current)));
  }

  applyTheme() {
    const theme = recall("theme") ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
    document.documentElement.dataset.theme = theme;
    this.#on.theme(theme);
  }

  /** A phone must not fall asleep over a lecture; where that cannot be asked for, it may. */
  async keepAwake() {
    this.#lock = await navigator.wakeLock?.request("screen").catch(() => null);
  }

  #quiet() {
    $("trouble").textContent = "";
    $("password").hidden = true;
  }

  #showLevel(db) {
    this.#db = Math.max(LOWEST_DB, Math.min(0, db));
    $("level").setAttribute("aria-valuenow", Math.round(this.#db));
    document.body.style.setProperty("--level", 1 - this.#db / LOWEST_DB);
  }

  #announce(text) {
    $("log").append(Object.assign(document.createElement("p"), { textContent: text }));
    while ($("log").children.length > ANNOUNCED) $("log").firstChild.remove();
  }

  #controls() {
    $("record").onclick = () => this.#on.toggle();
    $("open").onclick = () => $("file").click();
    $("file").onchange = ({ target }) => {
      if (target.files.length) this.#on.read(target.files[0]);
      target.value = ""; // so that the same file can be chosen again
    };
    $("device").onchange = () => {
      remember("device", this.device);
      this.#on.device();
    };
    $("theme").onclick = () => this.#turnTheme();
    $("password").onsubmit = (event) => {
      event.preventDefault();
      this.#on.token($("token").value);
    };
  }

  #turnTheme() {
    const dark = document.documentElement.dataset.theme === "dark";
    const wanted = dark ? "light" : "dark";
    const own = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
    remember("theme", wanted === own ? null : wanted); // back to what the system says, also when that changes
    this.applyTheme();
  }

  #exports() {
    $("copy").onclick = () => this.#copy();
    document.querySelectorAll("[data-save]").forEach((button) => {
      button.onclick = () => this.#save(button.dataset.save);
    });
  }

  async #copy() {
    try {
      await navigator.clipboard.writeText(toText(this.#on.segments()));
      this.#unsaved = false;
      this.say("Copied");
    } catch {
      this.fail("The browser did not let the page copy: mark the text and copy it yourself, or download it.");
    }
  }

  #save(format) {
    const [write, type] = FORMATS[format];
    const stamp = new Date().toISOString();
    const content = write(this.#on.segments(), { created: stamp, ...this.#on.about() });
    const href = URL.createObjectURL(new Blob([content], { type }));
    const name = `transcript-${stamp.slice(0, 16).replace(/[T:]/g, "-")}.${format}`;
    Object.assign(document.createElement("a"), { href, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(href), 10000);
    this.#unsaved = false;
  }

  #dialogs() {
    $("help").onclick = () => $("notes").showModal();
    document.querySelectorAll("[data-close]").forEach((button) => {
      button.onclick = () => button.closest("dialog").close();
    });
    $("keys").checked = recall("keys") !== "off";
    $("keys").onchange = () => remember("keys", $("keys").checked ? null : "off");
    $("clear").onclick = () => (this.#unsaved ? $("sure").showModal() : this.#clear());
    $("discard").addEventListener("click", () => this.#clear());
  }

  #clear() {
    if (this.#state !== "idle") return this.fail("Stop first, then clear: there is more to come.");
    $("invitation").hidden = false;
    $("tools").hidden = $("numbers").hidden = true;
    this.#unsaved = false;
    this.#quiet();
    $("log").replaceChildren();
    this.#on.clear();
    this.say("Ready");
    $("record").focus();
  }

  #drops() {
    const over = (on) => document.body.classList.toggle("dropping", on);
    document.addEventListener("dragover", (event) => {
      event.preventDefault();
      over(true);
    });
    document.addEventListener("dragleave", ({ relatedTarget }) => relatedTarget || over(false));
    document.addEventListener("drop", (event) => {
      event.preventDefault();
      over(false);
      const [file] = event.dataTransfer.files;
      if (file) this.#on.read(file);
    });
  }

  /** Single keys, unless they are switched off, a dialog is open or somebody types. */
  #key(event) {
    const busy = event.target.closest("input, select") || document.querySelector("dialog[open]");
    if (busy || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
    if (event.key === "Escape") return this.#on.escape();
    if (!$("keys").checked) return;
    const keys = { o: $("open"), c: $("copy"), t: $("theme"), "?": $("help") };
    if (event.target.closest("button") === null) keys[" "] = $("record");
    const button = keys[event.key.toLowerCase()];
    if (!button) return;
    event.preventDefault();
    button.click();
  }
}
