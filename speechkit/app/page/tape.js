// The sound that was sent, kept to replay words and to catch up after a lost connection.

const SLAB_SECONDS = 10;
const MARGIN_SECONDS = 0.1; // heard before and after a word
export const KEPT_SECONDS = 3600; // at 48 kHz 346 MB; what is older is forgotten

/** Parts that follow each other, one for each stream: times of a part count from `part.offset`. */
export class Tape {
  parts = [];
  #slabs = []; // [part, index], oldest first

  get seconds() {
    const last = this.parts.at(-1);
    return last ? last.offset + last.seconds : 0;
  }

  /** A new part of samples at `rate` Hz. */
  begin(rate) {
    const part = new Part(rate, this.seconds, (index) => this.#forget(part, index));
    this.parts.push(part);
    return part;
  }

  /** The samples around `start` to `end`, seconds of the tape, as {samples: Int16Array, rate}; null where forgotten. */
  cut(start, end) {
    const part = this.parts.findLast(({ offset }) => offset <= start) ?? this.parts[0];
    if (!part) return null;
    const sample = (time) => Math.round((time - part.offset) * part.rate);
    const [from, to] = [sample(start - MARGIN_SECONDS), sample(end + MARGIN_SECONDS)];
    const samples = part.slice(Math.max(0, from), Math.min(part.length, to));
    return samples && { samples, rate: part.rate };
  }

  #forget(part, index) {
    this.#slabs.push([part, index]);
    if (this.#slabs.length > KEPT_SECONDS / SLAB_SECONDS) {
      const [oldest, slab] = this.#slabs.shift();
      oldest.drop(slab);
    }
  }
}

class Part {
  length = 0; // samples
  #slabs = [];
  #size;
  #claim;

  constructor(rate, offset, claim) {
    Object.assign(this, { rate, offset });
    this.#size = SLAB_SECONDS * rate;
    this.#claim = claim;
  }

  get seconds() {
    return this.length / this.rate;
  }

  /** Append an Int16Array. */
  add(samples) {
    for (let from = 0; from < samples.length; ) {
      const [index, at] = [Math.floor(this.length / this.#size), this.length % this.#size];
      if (!this.#slabs[index]) {
        this.#slabs[index] = new Int16Array(this.#size);
        this.#claim(index);
      }
      const piece = samples.subarray(from, from + this.#size - at);
      this.#slabs[index].set(piece, at);
      this.length += piece.length;
      from += piece.length;
    }
  }

  /** A copy of the samples `from` to `to`; null where some of them were forgotten. */
  slice(from, to) {
    const samples = new Int16Array(Math.max(0, to - from));
    for (let done = 0; done < samples.length; ) {
      const [index, at] = [Math.floor((from + done) / this.#size), (from + done) % this.#size];
      if (!this.#slabs[index]) return null;
      const piece = this.#slabs[index].subarray(at, at + samples.length - done);
      samples.set(piece, done);
      done += piece.length;
    }
    return samples;
  }

  drop(index) {
    this.#slabs[index] = null;
  }
}

/** Samples between -1 and 1 as 16 bits; louder ones are clipped. */
export function toInt16(samples) {
  return Int16Array.from(samples, (x) => Math.round(32767 * Math.max(-1, Math.min(1, x))));
}
