// Replays pieces of the tape, one at a time.

export class Player {
  #context = null;
  #playing = null; // {source, onEnd}

  /** Play Int16Array `samples` at `rate` Hz; `onEnd` is called once, when they are over or stopped. */
  play({ samples, rate }, onEnd) {
    this.stop();
    if (!samples.length) return onEnd();
    this.#context ??= new AudioContext();
    this.#context.resume();
    const buffer = this.#context.createBuffer(1, samples.length, rate);
    buffer.copyToChannel(Float32Array.from(samples, (x) => x / 32768), 0);
    const source = this.#context.createBufferSource();
    source.buffer = buffer;
    source.connect(this.#context.destination);
    source.onended = () => this.stop();
    source.start();
    this.#playing = { source, onEnd };
  }

  stop() {
    const playing = this.#playing;
    this.#playing = null;
    if (!playing) return;
    playing.source.onended = null;
    playing.source.stop();
    playing.onEnd();
  }
}
