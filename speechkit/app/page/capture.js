// Runs on the audio thread: gathers the microphone's 128-sample quanta into messages of `samples`.

class Capture extends AudioWorkletProcessor {
  constructor({ processorOptions }) {
    super();
    this.block = new Float32Array(processorOptions.samples);
    this.filled = 0;
    this.running = true;
    this.port.onmessage = () => {
      this.post();
      this.running = false;
      this.port.postMessage(null); // nothing comes after it
    };
  }

  process([[samples]]) {
    for (let from = 0; samples && from < samples.length; ) {
      const piece = samples.subarray(from, from + this.block.length - this.filled);
      this.block.set(piece, this.filled);
      this.filled += piece.length;
      from += piece.length;
      if (this.filled === this.block.length) this.post();
    }
    return this.running;
  }

  post() {
    this.port.postMessage(this.block.slice(0, this.filled));
    this.filled = 0;
  }
}

registerProcessor("capture", Capture);
