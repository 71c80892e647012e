// A moving strip: the waveform above, its log-mel spectrum below, a pixel for each column of 16 ms.

import { logMel } from "./mel.js";

const HOP_SECONDS = 0.016;
const COLUMNS = 2048; // remembered, more than any page is wide
const FLOOR_DB = -92; // the colour of silence
const CEILING_DB = -22;
const WAVE_SHARE = 0.36; // of the height

// From silence to loud, and the waveform.
const PALETTES = {
  light: { stops: ["#f3efe7", "#cfe0da", "#5fa8a0", "#17666b", "#12303d"], wave: "#1c7a74" },
  dark: { stops: ["#1b1d21", "#1d3a44", "#23776f", "#7cc49a", "#fbe9a9"], wave: "#6cc5b9" },
};

export class Picture {
  #canvas;
  #strip = document.createElement("canvas");
  #analyse = null;
  #hop = 0;
  #pending = new Float32Array(0);
  #count = 0; // columns so far
  #levels = null; // bytes, a row of bands for each column
  #peaks = new Float32Array(2 * COLUMNS); // lowest and highest sample of each column
  #theme = "light";
  #asked = false;

  /** With `still` nothing scrolls: new columns overwrite the oldest from left to right. */
  constructor(canvas, { still }) {
    this.#canvas = canvas;
    this.still = still;
    new ResizeObserver(() => this.#ask()).observe(canvas);
  }

  set theme(name) {
    this.#theme = name;
    this.#ask();
  }

  /** The samples that follow are at `rate` Hz. */
  begin(rate) {
    this.#analyse = logMel(rate);
    this.#hop = Math.round(HOP_SECONDS * rate);
    this.#pending = new Float32Array(0);
    this.#levels ??= new Uint8Array(COLUMNS * this.#analyse.bands);
  }

  /** Append samples between -1 and 1. */
  add(samples) {
    const all = new Float32Array(this.#pending.length + samples.length);
    all.set(this.#pending);
    all.set(samples, this.#pending.length);
    const { size } = this.#analyse;
    let at = 0;
    for (; at + size <= all.length; at += this.#hop) this.#column(all.subarray(at, at + size));
    this.#pending = all.slice(at);
    this.#ask();
  }

  clear() {
    this.#count = 0;
    this.#ask();
  }

  #column(samples) {
    const at = this.#count++ % COLUMNS;
    const { bands } = this.#analyse;
    this.#analyse(samples).forEach((db, band) => {
      this.#levels[at * bands + band] = 255 * Math.max(0, Math.min(1, (db - FLOOR_DB) / (CEILING_DB - FLOOR_DB)));
    });
    const heard = samples.subarray(0, this.#hop);
    this.#peaks.set([Math.min(...heard), Math.max(...heard)], 2 * at);
  }

  #ask() {
    if (this.#asked) return;
    this.#asked = true;
    requestAnimationFrame(() => {
      this.#asked = false;
      this.#draw();
    });
  }

  #draw() {
    const { clientWidth: width, clientHeight: height } = this.#canvas;
    const scale = window.devicePixelRatio;
    Object.assign(this.#canvas, { width: width * scale, height: height * scale });
    const context = this.#canvas.getContext("2d");
    context.scale(scale, scale);
    const palette = PALETTES[this.#theme];
    context.fillStyle = palette.stops[0];
    context.fillRect(0, 0, width, height);
    const wave = Math.round(WAVE_SHARE * height);
    context.fillStyle = palette.wave;
    const shown = this.#shown(Math.min(width, COLUMNS));
    shown.forEach((column, x) => this.#bar(context, column, x, wave));
    if (this.#levels && shown.length) this.#spectrum(context, shown, wave, height - wave, palette);
  }

  /** The column to draw at each pixel from the left, -1 where there is none. */
  #shown(width) {
    const [first, turn] = [this.#count - width, Math.floor((this.#count - 1) / width) * width];
    return Array.from({ length: width }, (_, x) => {
      const column = this.still ? turn + x - (turn + x < this.#count ? 0 : width) : first + x;
      return column < 0 ? -1 : column % COLUMNS;
    });
  }

  #bar(context, column, x, height) {
    const [low, high] = column < 0 ? [0, 0] : this.#peaks.subarray(2 * column, 2 * column + 2);
    const louder = (sample) => Math.sign(sample) * Math.abs(sample) ** 0.6; // so that quiet speech is seen
    const [top, bottom] = [high, low].map((sample) => (height / 2) * (1 - 0.92 * louder(sample)));
    context.fillRect(x, top - 0.5, 1, bottom - top + 1);
  }

  #spectrum(context, shown, top, height, { stops }) {
    const bands = this.#levels.length / COLUMNS;
    const image = new ImageData(shown.length, bands);
    const pixels = new Uint32Array(image.data.buffer);
    const colours = gradient(stops);
    shown.forEach((column, x) => {
      for (let band = 0; band < bands; band++) {
        const level = column < 0 ? 0 : this.#levels[column * bands + band];
        pixels[(bands - 1 - band) * shown.length + x] = colours[level];
      }
    });
    Object.assign(this.#strip, { width: shown.length, height: bands });
    this.#strip.getContext("2d").putImageData(image, 0, 0);
    context.drawImage(this.#strip, 0, top, shown.length, height);
  }
}

/** 256 colours between `stops`, as the numbers an ImageData holds. */
function gradient(stops) {
  const parts = stops.map((stop) => [1, 3, 5].map((at) => parseInt(stop.slice(at, at + 2), 16)));
  return Uint32Array.from({ length: 256 }, (_, level) => {
    const place = (level / 255) * (parts.length - 1);
    const at = Math.min(Math.floor(place), parts.length - 2);
    const [r, g, b] = parts[at].map((from, k) => Math.round(from + (place - at) * (parts[at + 1][k] - from)));
    return ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0;
  });
}
