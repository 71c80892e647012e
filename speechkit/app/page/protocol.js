// The client's side of one stream over a WebSocket: what is on the tape goes out, messages come in, and a lost
// connection is taken up again where the server says that it stopped hearing.

const ENCODING = "pcm_s16le";
const BLOCK_SECONDS = 0.5; // longest message
const AHEAD_SECONDS = 4; // handed to the browser and not yet taken by the network
const STALL_SECONDS = 8; // without a sign of life while something is due
const RESUME_SECONDS = 15; // how long a server waits for a lost client, unless its `ready` says otherwise

/** Where the server listens, seen from a page at `base`. */
export function address(base) {
  const url = new URL("v1/stream", base);
  url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
  url.search = url.hash = "";
  return url.href;
}

/**
 * One stream. `part` is the part of the tape to send; call `push` when it has grown. Of `on`, `ready` and `text` get
 * the server's messages, `lost` the seconds until the next attempt, and `over`, last and once, a {code, message}: the
 * reason of the server's `end`, the code of its `error`, or "unreachable", or "lost".
 */
export class Stream {
  #url;
  #part;
  #token;
  #on;
  #socket = null;
  #id = null;
  #live = false; // the server is ready for samples
  #sent = 0;
  #stopping = false;
  #told = false; // on this connection, to stop
  #over = false;
  #lostAt = null;
  #attempts = 0;
  #window = RESUME_SECONDS;
  #heardAt = 0;
  #timers = { pump: 0, retry: 0, watch: 0 };
  #waiting = []; // for `taken`

  constructor({ url, part, token, on }) {
    this.#url = url;
    this.#part = part;
    this.#token = token;
    this.#on = on;
    this.#timers.watch = setInterval(() => this.#watch(), 1000);
    this.#connect({ type: "start", sample_rate: part.rate, encoding: ENCODING });
  }

  /** The part of the tape has grown. */
  push() {
    this.#pump();
  }

  /** Nothing will be added to the part any more; `over` follows once all of it was heard. */
  stop() {
    this.#stopping = true;
    this.#pump();
  }

  /** Drop the stream; nothing is called any more. */
  abandon() {
    this.#finish(null);
  }

  /** Resolves when all that was pushed is sent, or the stream is over. */
  taken() {
    return new Promise((resolve) => {
      this.#waiting.push(resolve);
      this.#pump();
    });
  }

  /** The network came back: what waits to be tried is tried at once; or went away, and every connection with it. */
  networkChanged(online) {
    if (this.#over) return;
    if (!online) this.#drop();
    else if (this.#lostAt !== null && !this.#socket) this.#resume();
  }

  #connect(hello) {
    const socket = new WebSocket(this.#url);
    this.#socket = socket;
    this.#heardAt = performance.now();
    const mine = (handle) => (event) => this.#socket === socket && handle(event);
    const token = this.#token ? { token: this.#token } : {};
    socket.onopen = mine(() => socket.send(JSON.stringify({ ...hello, ...token })));
    socket.onmessage = mine(({ data }) => this.#hear(JSON.parse(data)));
    socket.onclose = mine(() => this.#lose());
  }

  #hear(message) {
    this.#heardAt = performance.now();
    const handlers = {
      ready: () => this.#ready(message),
      text: () => this.#on.text(message),
      end: () => this.#finish({ code: message.reason }),
      error: () => this.#refused(message),
    };
    handlers[message.type]?.();
    this.#pump();
  }

  #ready(message) {
    this.#id = message.stream;
    this.#sent = message.received;
    this.#window = message.resume_seconds ?? this.#window;
    this.#live = true;
    this.#told = false;
    this.#lostAt = null;
    this.#attempts = 0;
    this.#on.ready(message);
  }

  #refused({ code, message, retry }) {
    if (!retry || this.#id === null) this.#finish({ code, message });
  }

  #pump() {
    clearTimeout(this.#timers.pump);
    if (!this.#live) return;
    const { rate } = this.#part;
    while (this.#sent < this.#part.length && this.#socket.bufferedAmount < 2 * rate * AHEAD_SECONDS) {
      const block = this.#part.slice(this.#sent, Math.min(this.#part.length, this.#sent + BLOCK_SECONDS * rate));
      this.#socket.send(block);
      this.#sent += block.length;
    }
    if (this.#sent < this.#part.length) this.#timers.pump = setTimeout(() => this.#pump(), 50);
    else this.#emptied();
  }

  #emptied() {
    this.#waiting.splice(0).forEach((resolve) => resolve());
    if (!this.#stopping || this.#told) return;
    this.#told = true;
    this.#socket.send(JSON.stringify({ type: "stop" }));
  }

  /** A dead network may go unnoticed for minutes: give a connection up that owes something and is silent. */
  #watch() {
    const due = this.#socket && (!this.#live || this.#told || this.#socket.bufferedAmount > 0);
    if (due && performance.now() - this.#heardAt > 1000 * STALL_SECONDS) this.#drop();
  }

  #drop() {
    const socket = this.#socket;
    if (!socket) return;
    this.#lose();
    socket.close();
  }

  #lose() {
    this.#socket = null;
    this.#live = false;
    if (this.#id === null) return this.#finish({ code: "unreachable" });
    const now = performance.now();
    this.#lostAt ??= now;
    const left = this.#window - (now - this.#lostAt) / 1000;
    if (left <= 0) return this.#finish({ code: "lost" });
    const wait = Math.min(0.5 * 2 ** this.#attempts++, 4, left);
    this.#timers.retry = setTimeout(() => this.#resume(), 1000 * wait);
    this.#on.lost(wait);
  }

  #resume() {
    clearTimeout(this.#timers.retry);
    this.#connect({ type: "resume", stream: this.#id });
  }

  #finish(outcome) {
    if (this.#over) return;
    this.#over = true;
    this.#live = false;
    clearInterval(this.#timers.watch);
    clearTimeout(this.#timers.pump);
    clearTimeout(this.#timers.retry);
    const socket = this.#socket;
    this.#socket = null;
    socket?.close();
    this.#waiting.splice(0).forEach((resolve) => resolve());
    if (outcome) this.#on.over(outcome);
  }
}
