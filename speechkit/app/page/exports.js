// The text as files. Segments are {text, words: [{word, start, end, confidence}]}, times in seconds; nothing here
// touches the page.

// Netflix' Timed Text Style Guide: two lines of 42 characters, at most 7 s; a second is the least an eye needs.
const LINE = 42;
const SHORTEST = 1;
const LONGEST = 7;
const PAUSE = 1.5; // seconds of silence that end a subtitle

/** A paragraph for each segment. */
export function toText(segments) {
  return segments.map(({ text }) => `${text}\n`).join("");
}

/** SubRip. */
export function toSRT(segments) {
  return cues(segments)
    .map(({ start, end, lines }, at) => `${at + 1}\n${clock(start, ",")} --> ${clock(end, ",")}\n${lines.join("\n")}\n`)
    .join("\n");
}

/** WebVTT. */
export function toVTT(segments) {
  const escape = (line) => line.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  const blocks = cues(segments).map(
    ({ start, end, lines }) => `${clock(start, ".")} --> ${clock(end, ".")}\n${lines.map(escape).join("\n")}\n`,
  );
  return ["WEBVTT\n", ...blocks].join("\n");
}

/** Everything that is known; `about` is put in front. */
export function toJSON(segments, about = {}) {
  const plain = segments.map(({ text, words }) => ({ text, words }));
  return `${JSON.stringify({ ...about, text: toText(segments).trimEnd(), segments: plain }, null, 2)}\n`;
}

/** Subtitles as {start, end, lines}: in order, never two at a time. */
export function cues(segments) {
  const groups = [];
  let group = null;
  for (const word of segments.flatMap(lastMarked)) {
    if (!group || breaks(group, word)) groups.push((group = []));
    group.push(word);
  }
  return groups.map((words, at) => {
    const [start, next] = [words[0].start, groups[at + 1]?.[0].start ?? Infinity];
    const shown = Math.min(LONGEST, Math.max(SHORTEST, words.at(-1).end - start));
    return { start, end: Math.min(start + shown, next), lines: wrap(words.map(({ word }) => word)) };
  });
}

function lastMarked({ words }) {
  return words.map((word, at) => ({ ...word, last: at === words.length - 1 }));
}

/** Whether a subtitle must end before `word`, or may and it is a good place. */
function breaks(group, word) {
  const [first, last] = [group[0], group.at(-1)];
  const full = wrap([...group, word].map((each) => each.word)).length > 2 || word.end - first.start > LONGEST;
  const good = last.last || word.start - last.end >= PAUSE || /[.?!…。？！]$/.test(last.word);
  return full || (good && word.start - first.start >= SHORTEST);
}

/** Lines of at most 42 characters; where two are enough, of about the same length. */
function wrap(words) {
  const lines = fill(words, LINE);
  if (lines.length !== 2) return lines;
  let width = Math.ceil((lines.join(" ").length - 1) / 2);
  while (fill(words, width).length > 2) width++;
  return fill(words, width);
}

function fill(words, width) {
  const lines = [];
  for (const word of words) {
    const longer = lines.length ? `${lines.at(-1)} ${word}` : word;
    if (lines.length && longer.length <= width) lines[lines.length - 1] = longer;
    else lines.push(word);
  }
  return lines;
}

function clock(seconds, point) {
  const ms = Math.round(1000 * seconds);
  const two = (value) => String(Math.floor(value) % 60).padStart(2, "0");
  const hours = String(Math.floor(ms / 3600000)).padStart(2, "0");
  return `${hours}:${two(ms / 60000)}:${two(ms / 1000)}${point}${String(ms % 1000).padStart(3, "0")}`;
}
