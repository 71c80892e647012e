// The page: one stream at a time, from a microphone or a file, and the text of all of them.

import { Player } from "./player.js";
import { Picture } from "./picture.js";
import { Stream, address } from "./protocol.js";
import { Microphone, decode, microphones } from "./recorder.js";
import { Shell, recall } from "./shell.js";
import { Tape, toInt16 } from "./tape.js";
import { Transcript, TranscriptView, minutes } from "./transcript.js";

const ENDED = {
  stop: "Done",
  idle: "The server heard nothing for a while and ended the stream. Press the button to go on.",
  limit: "The stream reached the length the server allows. Press the button to go on in a new one.",
  shutdown: "The server is shutting down. Your text stays here; press the button to go on when it is back.",
  unreachable: "The server does not answer. See that it runs, then press the button again.",
  lost: "The connection could not be taken up again, so the stream is over. The text up to here stays.",
};
const MUTED_SECONDS = 3;
const lost = (seconds) =>
  `The connection was lost; trying again in ${seconds.toFixed(1)} s. Nothing is lost that you say meanwhile.`;

class App {
  tape = new Tape();
  transcript = new Transcript();
  player = new Player();
  run = null; // the stream that is on: {stream, part, microphone or file, ...}
  token = sessionStorage.getItem("token") ?? "";
  about = {}; // model and search
  again = null; // what an accepted token starts anew

  constructor() {
    this.shell = new Shell({
      toggle: () => this.toggle(),
      read: (file) => this.read(file),
      token: (token) => this.useToken(token),
      clear: () => this.clear(),
      escape: () => this.player.stop(),
      theme: (name) => (this.picture.theme = name),
      device: () => this.run?.microphone?.open(this.shell.device).catch((error) => this.shell.fail(error.message)),
      segments: () => this.transcript.spoken,
      about: () => this.about,
    });
    const motion = matchMedia("(prefers-reduced-motion: reduce)");
    this.picture = new Picture(this.shell.canvas, { still: motion.matches });
    motion.onchange = () => (this.picture.still = motion.matches);
    this.view = new TranscriptView(this.shell.text, { replay: (word, node) => this.replay(word, node) });
    this.shell.applyTheme();
    addEventListener("online", () => this.run?.stream?.networkChanged(true));
    addEventListener("offline", () => this.run?.stream?.networkChanged(false));
    this.askModel();
    this.listDevices();
    navigator.mediaDevices?.addEventListener("devicechange", () => this.listDevices());
  }

  async askModel() {
    const answer = await fetch("health").catch(() => null); // without one, the first stream tells
    if (answer?.ok) this.shell.showModel(await answer.json());
  }

  async listDevices() {
    this.shell.showDevices(await microphones(), recall("device"));
  }

  toggle() {
    if (!this.run) return this.listen();
    if (this.run.stream) return this.stop();
  }

  async listen() {
    this.again = () => this.listen();
    const microphone = new Microphone({
      onBlock: (samples) => mine() && this.heard(samples), // some come after the end
      onEnd: () => mine() && this.stop("The microphone was unplugged. The text up to here stays."),
    });
    const mine = () => this.run?.microphone === microphone;
    this.run = { microphone };
    this.player.stop();
    this.shell.enter("asking", "May this page use the microphone?");
    try {
      await microphone.open(this.shell.device);
    } catch (error) {
      await microphone.close();
      return this.rest(error.message);
    }
    this.begin(this.tape.begin(microphone.rate));
    this.shell.enter("listening", "Connecting …");
    this.listDevices();
    this.shell.keepAwake();
  }

  async read(file) {
    if (this.run) return this.shell.fail("Stop first, then open the file: the page hears one thing at a time.");
    this.again = () => this.read(file);
    this.run = { file };
    this.shell.enter("asking", `Opening ${file.name} …`);
    try {
      const { samples, rate } = await decode(file);
      Object.assign(this.run, { samples });
      this.begin(this.tape.begin(rate));
    } catch (error) {
      return this.rest(error.message);
    }
    this.shell.enter("reading", "Connecting …");
    await this.feed(this.run);
  }

  /** Second by second, as fast as the server takes it. */
  async feed(run) {
    const { samples, part, stream } = run;
    for (let at = 0; at < samples.length && this.run === run && !run.stopping; at += part.rate) {
      this.heard(samples.subarray(at, at + part.rate));
      await stream.taken();
    }
    if (!run.stopping) stream.stop();
  }

  begin(part) {
    this.transcript.begin(part.offset);
    this.picture.begin(part.rate);
    const on = {
      ready: (message) => this.ready(message),
      text: (message) => this.said(message),
      lost: (seconds) => this.shell.say(lost(seconds), "lost"),
      over: (outcome) => this.over(outcome),
    };
    const stream = new Stream({ url: address(document.baseURI), part, token: this.token, on });
    Object.assign(this.run, { part, stream, silent: 0, latencies: [] });
  }

  heard(samples) {
    const { part, stream, microphone } = this.run;
    part.add(toInt16(samples));
    this.picture.add(samples);
    stream.push();
    if (microphone) this.listenFor(this.shell.meter(samples), samples.length / part.rate);
  }

  /** A muted microphone gives zeros, and the words never come: say why. */
  listenFor(peak, seconds) {
    const before = this.run.silent;
    this.run.silent = peak > 0 ? 0 : before + seconds;
    const [was, is] = [before >= MUTED_SECONDS, this.run.silent >= MUTED_SECONDS];
    if (is && !was) this.shell.say("The microphone gives no sound at all: is it muted?");
    if (was && !is) this.shell.say("Listening");
  }

  ready({ model, search, chunk_ms: chunk }) {
    Object.assign(this.run, { chunk, since: this.run.since ?? performance.now() });
    this.about = { model, search };
    this.shell.showModel(this.about);
    if (!this.run.stopping) this.shell.say(this.run.file ? `Reading ${this.run.file.name}` : "Listening");
  }

  said(message) {
    const index = this.transcript.apply(message);
    const segment = this.transcript.segments[index];
    this.view.update(index, segment);
    this.shell.follow(segment);
    const { file, part, samples } = this.run;
    const heard = minutes(part.offset + message.seconds);
    this.shell.showNumbers({ heard, latency: file ? null : message.latency_ms, factor: this.factor(message) });
    if (file) this.shell.progress(message.seconds / (samples.length / part.rate));
  }

  /** Of a file, the time it took; of a microphone, how much of a chunk's time its chunks took, the last twenty. */
  factor({ seconds, latency_ms: latency }) {
    const { file, since, latencies, chunk } = this.run;
    if (file) return (performance.now() - since) / 1000 / seconds;
    latencies.push(latency);
    if (latencies.length > 20) latencies.shift();
    return latencies.reduce((sum, each) => sum + each, 0) / latencies.length / chunk;
  }

  async stop(because = "") {
    const { microphone, stream } = this.run;
    if (this.run.stopping) return;
    Object.assign(this.run, { stopping: true, because });
    this.shell.enter("stopping", "Hearing the rest …");
    await microphone?.close();
    stream.stop();
  }

  over({ code, message }) {
    const { microphone, because, stopping } = this.run;
    if (!stopping) microphone?.close();
    this.run.stopping = true;
    const closed = this.transcript.close();
    if (closed >= 0) this.view.update(closed, this.transcript.segments[closed]);
    if (code === "stop" && !because) return this.rest("", ENDED.stop);
    this.rest(because || (ENDED[code] ?? message ?? `The server ended the stream: ${code}.`));
    if (code === "unauthorised") this.askToken();
  }

  /** Nothing is on any more; `trouble` says why, where it was not the reader who wanted that. */
  rest(trouble, status = "Ready") {
    this.run = null;
    this.shell.enter("idle", status);
    if (trouble) this.shell.fail(trouble);
  }

  askToken() {
    const words = this.token ? "That is not this server's token" : "This server wants a token";
    this.shell.fail(`${words}: ask the one who runs it, and enter it here.`);
    this.shell.askToken();
  }

  useToken(token) {
    this.token = token;
    sessionStorage.setItem("token", token);
    this.again();
  }

  replay(word, node) {
    if (this.run?.microphone) return this.shell.say("Stop listening to replay a word: the microphone would hear it.");
    const cut = this.tape.cut(word.start, word.end);
    if (!cut) return this.shell.say("This word was said more than an hour ago; its sound was not kept.");
    this.player.play(cut, () => node.classList.remove("playing"));
    node.classList.add("playing");
  }

  clear() {
    this.tape = new Tape();
    this.transcript = new Transcript();
    this.view.clear();
    this.picture.clear();
  }
}

new App();
