"""Where transcripts go: to the terminal, or into a folder that remembers how far a long recording was heard."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from speechkit.app.formats import FORMATS, SUFFIXES, json_line, table
from speechkit.files import replacing, to_disk
from speechkit.types import Transcript, Word


class Faults:
    """Recordings that cannot be used: a sentence each on stderr, and how many there were."""

    def __init__(self) -> None:
        self.count = 0

    @contextmanager
    def reporting(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError) as fault:
            self.count += 1
            print(f"speechkit: {fault}", file=sys.stderr)


def make(folder: Path, files: Sequence[str], suffix: str) -> None:
    """Make the folder in which each recording is to have a file of its name and this suffix.

    Raises:
        ValueError: where two of them would be one.
    """
    names: dict[str, str] = {}
    for file in files:
        other = names.setdefault(Path(file).stem, file)
        if other != file:
            raise ValueError(
                f"Recordings written to one folder must have different names, but {other} and {file} would both be "
                f"{folder / Path(file).stem}{suffix}; give them folders of their own."
            )
    folder.mkdir(parents=True, exist_ok=True)


class Printed:
    """Transcripts on stdout, as they are ready."""

    def __init__(self, files: Sequence[str], as_json: bool, timestamps: bool) -> None:
        self.as_json, self.timestamps, self.named = as_json, timestamps, len(files) > 1

    def __call__(self, file: str, transcript: Transcript, rtf: float) -> None:
        if self.as_json:
            print(json_line(file, transcript, rtf=round(rtf, 4)), flush=True)
            return
        print(f"{file}: {transcript.text}" if self.named else transcript.text)
        if self.timestamps:
            print(*table(transcript), sep="\n")
        sys.stdout.flush()


class Folder:
    """Transcripts as files of a folder, ``<name>.txt`` and the like for ``<name>.wav``; each appears whole or not.

    Raises:
        ValueError: where two recordings would be written to one name.
    """

    def __init__(self, folder: str, files: Sequence[str], formats: Sequence[str]) -> None:
        self.folder, self.formats = Path(folder), formats
        make(self.folder, files, SUFFIXES[formats[0]])

    def paths(self, file: str) -> dict[str, Path]:
        return {name: self.folder / (Path(file).stem + SUFFIXES[name]) for name in self.formats}

    def done(self, file: str) -> bool:
        """Whether all was written; then what was heard on the way is not needed any more."""
        if done := all(path.exists() for path in self.paths(file).values()):
            self._part(file).unlink(missing_ok=True)
        return done

    def part(self, file: str, made: dict[str, Any]) -> Part:
        """What was heard of a recording so far."""
        return Part(self._part(file), made)

    def __call__(self, file: str, transcript: Transcript, rtf: float) -> None:
        contents = {path: FORMATS[name](file, transcript) for name, path in self.paths(file).items()}
        for path, content in contents.items():
            with replacing(path) as draft:
                draft.write_text(content, encoding="utf-8")
                to_disk(draft)
        self._part(file).unlink(missing_ok=True)
        print(f"{file}: {', '.join(map(str, contents))}", flush=True)

    def _part(self, file: str) -> Path:
        return self.folder / f"{Path(file).stem}.part.jsonl"


class Part:
    """The groups of transcripts that were heard of one recording, a line each, in a file that survives a stop.

    A line counts when it is whole and next in order; what a stop left after the last such line is cut off. The first
    line says what they were made from and with: where that is something else now, they are forgotten.
    """

    def __init__(self, path: Path, made: dict[str, Any]) -> None:
        self.path, self.groups = path, list[list[Transcript]]()
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        good = 0
        for number, line in enumerate(lines):
            record = _whole(line)
            if record is None or (record.get("made") != made if number == 0 else record.get("group") != number):
                break
            good += len(line)
            if number:
                self.groups.append([_transcript(item) for item in record["heard"]])
        if lines:
            os.truncate(path, good)
        if not good:
            self._write({"made": made})

    def add(self, heard: list[Transcript]) -> None:
        """Remember one more group, for good when this returns."""
        self.groups.append(heard)
        self._write({"group": len(self.groups), "heard": [_record(item) for item in heard]})

    def _write(self, record: dict[str, Any]) -> None:
        with open(self.path, "ab") as file:
            file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        to_disk(self.path)


def _whole(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _record(transcript: Transcript) -> dict[str, Any]:
    words = [[word.word, word.start, word.end, word.confidence] for word in transcript.words]
    return {"text": transcript.text, "words": words, "seconds": transcript.seconds}


def _transcript(record: dict[str, Any]) -> Transcript:
    return Transcript(record["text"], tuple(Word(*word) for word in record["words"]), record["seconds"])
