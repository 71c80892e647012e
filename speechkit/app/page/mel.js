// Log-mel spectra for the picture; the recogniser computes its own.

const BANDS = 64;
const LOWEST_HZ = 60;
const HIGHEST_HZ = 8000;
const mel = (hz) => 2595 * Math.log10(1 + hz / 700);
const hz = (mels) => 700 * (10 ** (mels / 2595) - 1);

/** Returns a function from `size` samples to 64 band energies in dB full scale, lowest band first. */
export function logMel(rate) {
  const size = 2 ** Math.round(Math.log2(0.025 * rate));
  const window = Float32Array.from({ length: size }, (_, n) => 0.5 - 0.5 * Math.cos((2 * Math.PI * n) / size));
  const bands = filters(rate, size);
  const transform = fft(size);
  const analyse = (samples) => {
    const power = transform(samples.map((x, n) => x * window[n]));
    return Float32Array.from(bands, ({ from, weights }) => {
      const energy = weights.reduce((sum, weight, k) => sum + weight * power[from + k], 0);
      return 10 * Math.log10(energy / (size / 4) ** 2 + 1e-12); // a full-scale sine is 0 dB in its bin
    });
  };
  return Object.assign(analyse, { size, bands: BANDS });
}

/** Triangles of height 1, evenly spaced in mel; a low one narrower than a bin takes its nearest. */
export function filters(rate, size) {
  const highest = mel(Math.min(HIGHEST_HZ, rate / 2));
  const edge = (band) => hz(mel(LOWEST_HZ) + (band * (highest - mel(LOWEST_HZ))) / (BANDS + 1)) / (rate / size);
  return Array.from({ length: BANDS }, (_, band) => {
    const [low, mid, high] = [edge(band), edge(band + 1), edge(band + 2)];
    const from = Math.ceil(low);
    const weights = Array.from({ length: Math.floor(high) - from + 1 }, (_, k) =>
      Math.max(0, Math.min((from + k - low) / (mid - low), (high - from - k) / (high - mid))),
    );
    return weights.some((weight) => weight > 0.1) ? { from, weights } : { from: Math.round(mid), weights: [1] };
  });
}

/**
 * Returns a function from `size` real samples, a power of two, to the squared magnitudes of the first half of their
 * spectrum (Cooley and Tukey 1965).
 */
export function fft(size) {
  const bits = Math.log2(size);
  const order = Uint16Array.from({ length: size }, (_, n) => {
    let reversed = 0;
    for (let bit = 0; bit < bits; bit++) reversed |= ((n >> bit) & 1) << (bits - 1 - bit);
    return reversed;
  });
  const cos = Float32Array.from({ length: size / 2 }, (_, k) => Math.cos((2 * Math.PI * k) / size));
  const sin = Float32Array.from({ length: size / 2 }, (_, k) => -Math.sin((2 * Math.PI * k) / size));
  const [re, im] = [new Float32Array(size), new Float32Array(size)];
  return (samples) => {
    order.forEach((from, to) => (re[to] = samples[from]));
    im.fill(0);
    for (let half = 1; half < size; half *= 2) {
      for (let start = 0; start < size; start += 2 * half) butterflies(start, half);
    }
    return Float32Array.from({ length: size / 2 + 1 }, (_, k) => re[k] ** 2 + im[k] ** 2);
  };

  function butterflies(start, half) {
    const step = size / (2 * half);
    for (let k = 0; k < half; k++) {
      const [a, b, c, s] = [start + k, start + k + half, cos[k * step], sin[k * step]];
      const [x, y] = [re[b] * c - im[b] * s, re[b] * s + im[b] * c];
      re[b] = re[a] - x;
      im[b] = im[a] - y;
      re[a] += x;
      im[a] += y;
    }
  }
}
