// Where sound comes from: microphones and files. What goes wrong is an Error whose message is for the reader.

const BLOCK_SECONDS = 0.06;
// Every recogniser here hears speech at 16 kHz or less, and an hour in stereo at 48 kHz would decode to 1.4 GB.
const FILE_RATE = 16000;

/** A microphone that hands Float32Arrays at `rate` Hz to `onBlock`, and calls `onEnd` when it was unplugged. */
export class Microphone {
  #context = null;
  #node = null;
  #source = null;

  constructor({ onBlock, onEnd }) {
    Object.assign(this, { onBlock, onEnd });
  }

  /** The sample rate of the sound card; known once opened. */
  get rate() {
    return this.#context.sampleRate;
  }

  /**
   * Ask for the microphone `device`, an id of `microphones()` or "" for the default; blocks come from now on.
   * Another one can be opened in the middle: the sound goes on from there.
   */
  async open(device) {
    const stream = await ask(device);
    this.#release();
    this.#node ??= await this.#listen();
    this.#source = this.#context.createMediaStreamSource(stream);
    this.#source.connect(this.#node);
    stream.getAudioTracks()[0].onended = () => this.onEnd();
  }

  /** Hand over what was gathered last, and give the microphone back. */
  async close() {
    this.#release();
    if (this.#node) await this.#flush(this.#node.port);
    await this.#context?.close();
    this.#node = this.#context = null;
  }

  async #listen() {
    this.#context = new AudioContext();
    await this.#context.audioWorklet.addModule(new URL("capture.js", import.meta.url)).catch(() => {
      throw new Error("The server did not send all of this page: see that it runs, then reload the page.");
    });
    await this.#context.resume();
    const samples = Math.round(BLOCK_SECONDS * this.rate);
    const node = new AudioWorkletNode(this.#context, "capture", { processorOptions: { samples } });
    node.port.onmessage = ({ data }) => data && this.onBlock(data);
    node.connect(this.#context.destination); // silent, but without a way to the speakers some browsers let it sleep
    return node;
  }

  #release() {
    this.#source?.disconnect();
    this.#source?.mediaStream.getTracks().forEach((track) => track.stop());
    this.#source = null;
  }

  #flush(port) {
    return new Promise((resolve) => {
      port.onmessage = ({ data }) => (data ? this.onBlock(data) : resolve());
      port.postMessage("flush");
      setTimeout(resolve, 500); // an audio thread that has died does not answer
    });
  }
}

/** The microphones that can be chosen, as {id, name}: only once one was allowed do they have names. */
export async function microphones() {
  const all = (await navigator.mediaDevices?.enumerateDevices()) ?? [];
  return all
    .filter(({ kind, deviceId, label }) => kind === "audioinput" && deviceId && deviceId !== "default" && label)
    .map(({ deviceId, label }) => ({ id: deviceId, name: label }));
}

/** All samples of an audio or video file as {samples: Float32Array, rate}, its channels mixed. */
export async function decode(file) {
  const context = new OfflineAudioContext(1, 1, FILE_RATE);
  const sound = await context.decodeAudioData(await file.arrayBuffer()).catch(() => {
    throw new Error(`“${file.name}” is not a recording this browser can read: try WAV, MP3, M4A, FLAC or Ogg.`);
  });
  if (!sound.length) throw new Error(`“${file.name}” has no sound in it: choose another file.`);
  const samples = sound.getChannelData(0);
  for (let channel = 1; channel < sound.numberOfChannels; channel++) {
    sound.getChannelData(channel).forEach((x, at) => (samples[at] += x));
  }
  if (sound.numberOfChannels > 1) samples.forEach((x, at) => (samples[at] = x / sound.numberOfChannels));
  return { samples, rate: sound.sampleRate };
}

async function ask(device) {
  if (!navigator.mediaDevices?.getUserMedia) throw new Error(insecure());
  const known = (await microphones()).some(({ id }) => id === device);
  // The model learnt from sound as it was recorded: no canceller and no suppressor; a quiet voice may be amplified.
  const audio = { channelCount: 1, echoCancellation: false, noiseSuppression: false, autoGainControl: true };
  if (known) audio.deviceId = { exact: device };
  try {
    return await navigator.mediaDevices.getUserMedia({ audio });
  } catch (error) {
    throw new Error(REFUSED[error.name] ?? `The microphone could not be opened (${error.name}): choose another one.`);
  }
}

const REFUSED = {
  NotAllowedError:
    "The microphone may not be used: allow it for this page (beside the address), then press the button again.",
  NotFoundError: "No microphone was found: plug one in, then press the button again. Files can be read without one.",
  NotReadableError: "The microphone is in use elsewhere: close the program that holds it, then press the button again.",
};

function insecure() {
  if (window.isSecureContext) return "This browser cannot record sound: try a current Chrome, Edge, Firefox or Safari.";
  const { port, hostname } = location;
  const at = port || "80";
  return (
    "Browsers give the microphone only to pages that came over https or from this computer itself. Serve it with a " +
    `certificate, or run “ssh -L ${at}:localhost:${at} ${hostname}” and open http://localhost:${at}. ` +
    "Files can be read here too."
  );
}
