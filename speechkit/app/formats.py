"""A transcript as text, JSON, or subtitles (SubRip, WebVTT)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

from speechkit.types import Seconds, Transcript, Word

CUE_LETTERS, CUE_SECONDS, CUE_PAUSE = 84, 7.0, 0.8  # two lines of 42, as broadcasters have it; a pause begins a new cue


def json_line(file: str, transcript: Transcript, **more: float) -> str:
    """One object: the file, its text, its words with their times, its length."""
    words = [
        {"word": w.word, "start": round(w.start, 3), "end": round(w.end, 3), "confidence": round(w.confidence, 4)}
        for w in transcript.words
    ]
    line = {"file": file, "text": transcript.text, "words": words, "seconds": round(transcript.seconds, 3), **more}
    return json.dumps(line, ensure_ascii=False)


def table(transcript: Transcript) -> Iterator[str]:
    """A line a word: start, end, confidence, word."""
    return (f"{w.start:9.2f} {w.end:9.2f}  {w.confidence:4.2f}  {w.word}" for w in transcript.words)


def srt(transcript: Transcript) -> str:
    """SubRip."""
    blocks = [
        f"{number}\n{_clock(start, ',')} --> {_clock(end, ',')}\n{text}\n"
        for number, (start, end, text) in enumerate(cues(transcript), 1)
    ]
    return "\n".join(blocks)


def vtt(transcript: Transcript) -> str:
    """WebVTT."""
    escaped = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})
    blocks = [
        f"{_clock(start, '.')} --> {_clock(end, '.')}\n{text.translate(escaped)}\n"
        for start, end, text in cues(transcript)
    ]
    return "\n".join(["WEBVTT\n", *blocks])


def cues(transcript: Transcript) -> Iterator[tuple[Seconds, Seconds, str]]:
    """Start, end and text of each subtitle: words that follow without a pause, as many as can be read together.

    Raises:
        ValueError: for a text without times.
    """
    if transcript.text and not transcript.words:
        raise ValueError(
            "Subtitles need the times of the words, but this search gives none; take another, as with --search greedy."
        )
    cue: list[Word] = []
    for word in transcript.words:
        if cue and _full(cue, word):
            yield cue[0].start, cue[-1].end, _text(cue)
            cue = []
        cue.append(word)
    if cue:
        yield cue[0].start, cue[-1].end, _text(cue)


def _full(cue: list[Word], word: Word) -> bool:
    return (
        word.start - cue[-1].end >= CUE_PAUSE
        or word.end - cue[0].start > CUE_SECONDS
        or len(_text([*cue, word])) > CUE_LETTERS
    )


def _text(cue: list[Word]) -> str:
    return " ".join(word.word for word in cue)


def _clock(at: Seconds, point: str) -> str:
    milliseconds = round(1000 * at)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02}{point}{rest % 1000:03}"


# What a file of each kind holds. No time that a computation took: the same recording and model give the same file.
FORMATS: dict[str, Callable[[str, Transcript], str]] = {
    "text": lambda _, transcript: transcript.text + "\n",
    "json": lambda file, transcript: json_line(file, transcript) + "\n",
    "srt": lambda _, transcript: srt(transcript),
    "vtt": lambda _, transcript: vtt(transcript),
}
SUFFIXES = {"text": ".txt", "json": ".json", "srt": ".srt", "vtt": ".vtt"}
