"""The command `speechkit`: one verb for each thing to do. Grammar here, the work in the module of the verb.

What is wrong with the input is one sentence on stderr and exit status 1, or 2 where the command itself is wrong;
``--debug`` or ``SPEECHKIT_DEBUG=1`` shows where it came from.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence

EXAMPLES = """\
examples:
  speechkit prepare digits --out data/digits
  speechkit train recipes/digits/conf/demo.yaml trainer.max_steps=2000
  speechkit evaluate runs/demo --search greedy rescored --chunk-ms 320 640
  speechkit transcribe runs/demo a.wav b.flac --json
  speechkit transcribe runs/demo talk.mp3 --vad --out talks --format text srt
  speechkit tag runs/tags street.wav --events
  speechkit stream runs/demo --mic
  speechkit serve runs/demo

A model is a run (runs/demo) or a model folder (runs/demo/model)."""

MEDIAN = "of events: smooth the scores of frames by a running median of S seconds (default 0.3; 0 does not)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and say its exit status."""
    options = _parser().parse_args(argv)
    if options.__dict__.pop("local", False):
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when the library of the hub is first imported, for the first model
    debug = options.__dict__.pop("debug", False) or bool(os.environ.get("SPEECHKIT_DEBUG"))
    run = options.__dict__.pop("run")
    try:
        return run(**vars(options)) or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # for example: speechkit transcribe ... | head -1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ImportError) as error:
        if debug:
            raise
        print(f"speechkit: {_sentence(error)}", file=sys.stderr)
        return 1


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename} must be read or written, but cannot be ({error.strerror}); check the path."
    return " ".join(str(error).split())


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show where in the code an error was raised"
    )
    common.add_argument(
        "--local", action="store_true", default=argparse.SUPPRESS, help="take models of the hub from the local cache"
    )
    parser = argparse.ArgumentParser(
        prog="speechkit",
        description="Audio and speech models in which the model you train is the model you stream.",
        epilog=EXAMPLES,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=28),
        parents=[common],
    )
    parser.add_argument(
        "--version", action=_Version, nargs=0, default=argparse.SUPPRESS, help="show the version and exit"
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB", title="verbs")
    for add in (_prepare, _train, _evaluate, _transcribe, _tag, _stream, _serve):
        add(verbs, common)
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from speechkit import __version__

        parser.exit(message=f"speechkit {__version__}\n")


def _prepare(verbs: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    verb = _verb(
        verbs, common, "prepare", "make the manifests of a dataset, and the dataset itself where it is synthetic"
    )
    verb.add_argument("name", metavar="NAME", help="a folder of recipes/, for example digits")
    verb.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="see: speechkit prepare NAME --help")
    verb.set_defaults(run=_lazy("prepare", "prepare"))


def _train(verbs: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    verb = _verb(verbs, common, "train", "train a model, or continue a training that was stopped")
    verb.add_argument("config", metavar="CONFIG", help="for example recipes/digits/conf/demo.yaml")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help="for example trainer.max_steps=2000")
    verb.set_defaults(run=_lazy("train", "train"))


def _evaluate(verbs: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    verb = _verb(verbs, common, "evaluate", "how wrong runs are, in one table: recognisers by words, taggers by labels")
    verb.add_argument(
        "inputs",
        nargs="+",
        metavar="RUN|DATA",
        help="runs or model folders, and manifests (.jsonl, .jsonl.gz) to evaluate them on; "
        "without a manifest each run is evaluated on the test sets of its own config",
    )
    verb.add_argument("--split", help="of the manifests, only the utterances of this split")
    verb.add_argument("--search", nargs="+", metavar="NAME", help="files of conf/search/; the model's own unless given")
    verb.add_argument("--stream", action="store_true", help="also streamed, in the model's own chunks")
    verb.add_argument("--chunk-ms", nargs="+", type=_milliseconds, metavar="N", help="also streamed, in chunks of N ms")
    verb.add_argument(
        "--batch", type=_count, default=16, metavar="N", help="utterances or clips at a time (default 16)"
    )
    verb.add_argument("--worst", type=int, default=3, metavar="N", help="worst utterances or clips to show (default 3)")
    verb.add_argument("--threshold", type=_share, metavar="P", help="of events: a frame's score, 0 to 1 (default 0.5)")
    verb.add_argument("--median", type=_seconds, metavar="S", help=MEDIAN)
    verb.add_argument("--json", dest="as_json", action="store_true", help="one JSON object a row instead of the table")
    verb.set_defaults(run=_lazy("evaluate", "evaluate"))


def _transcribe(verbs: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    verb = _verb(verbs, common, "transcribe", "audio files in, text out")
    verb.add_argument("model", metavar="MODEL")
    verb.add_argument("files", nargs="+", metavar="FILE")
    verb.add_argument("--stream", action="store_true", help="hear them chunk by chunk, as a live stream would be")
    verb.add_argument(
        "--chunk-ms", type=_milliseconds, metavar="N", help="length of a chunk; the model's own unless given"
    )
    verb.add_argument("--json", dest="as_json", action="store_true", help="one JSON object a line")
    verb.add_argument("--timestamps", action="store_true", help="a line a word: start, end, confidence, word")
    verb.add_argument("--search", metavar="NAME", help="a file of conf/search/; the model's own unless given")
    verb.add_argument(
        "--batch", type=_count, default=16, metavar="N", help="files at a time, or clips of a long one (default 16)"
    )
    verb.add_argument("--vad", action="store_true", help="hear speech only, and cut long recordings between it")
    verb.add_argument(
        "--out", metavar="FOLDER", help="write files instead; a run that was stopped continues, what is done is skipped"
    )
    verb.add_argument(
        "--format",
        dest="formats",
        nargs="+",
        choices=("text", "json", "srt", "vtt"),
        default=(),
        metavar="F",
        help="what is written to FOLDER: text, json, srt, vtt (default text)",
    )
    verb.set_defaults(run=_lazy("transcribe", "transcribe"))


def _tag(verbs: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    verb = _verb(verbs, common, "tag", "audio files in, labels out: what is heard in them, and when")
    verb.add_argument("model", metavar="MODEL")
    verb.add_argument("files", nargs="+", metavar="FILE")
    verb.add_argument("--top", type=_count, default=5, metavar="N", help="labels of highest score (default 5)")
    verb.add_argument(
        "--threshold", type=_share, metavar="P", help="only labels with this score, 0 to 1; of events 0.5 unless given"
    )
    verb.add_argument("--events", action="store_true", help="a line for each event: when a label begins and ends")
    verb.add_argument("--median", type=_seconds, metavar="S", help=MEDIAN)
    verb.add_argument("--json", dest="as_json", action="store_true", help="one JSON object a line")
    verb.add_argument(
        "--explain", metavar="FOLDER", help="also write a picture of each file: where in its spectrogram that is heard"
    )
    verb.set_defaults(run=_lazy("tag", "tag"))


def _stream(verbs: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    verb = _verb(
        verbs, common, "stream", "a microphone or a file as a live stream: the text as it comes, then all of it"
    )
    verb.add_argument("model", metavar="MODEL")
    source = verb.add_mutually_exclusive_group(required=True)
    source.add_argument("file", nargs="?", metavar="FILE")
    source.add_argument("--mic", action="store_true", help="a microphone; Ctrl-C ends it, and what is left is heard")
    source.add_argument("--list-devices", action="store_true", help="show the microphones there are, and exit")
    verb.add_argument("--device", metavar="NAME|N", help="which microphone; the system's own choice unless given")
    verb.add_argument(
        "--chunk-ms", type=_milliseconds, metavar="N", help="length of a chunk; the model's own unless given"
    )
    verb.add_argument("--search", metavar="NAME", help="a file of conf/search/; the model's own unless given")
    verb.add_argument("--vad", action="store_true", help="hear speech only: silence costs no step of the model")
    verb.add_argument("--realtime", action="store_true", help="a file no faster than it was spoken")
    verb.set_defaults(run=_lazy("stream", "stream"))


def _serve(verbs: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    verb = _verb(
        verbs, common, "serve", "live transcription of many streams over WebSockets, and a page with a microphone"
    )
    verb.add_argument("model", metavar="MODEL")
    verb.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine alone)"
    )
    verb.add_argument("--port", type=_port, default=8765, help="(default 8765; 0 takes any that is free)")
    verb.add_argument(
        "--token",
        default=os.environ.get("SPEECHKIT_TOKEN"),
        help="a secret that clients must say; SPEECHKIT_TOKEN in the environment keeps it out of the list of processes",
    )
    verb.add_argument("--device", metavar="NAME", help="for example cpu or cuda:1; a GPU if there is one unless given")
    verb.add_argument(
        "--chunk-ms", type=_milliseconds, metavar="N", help="length of a chunk; the model's own unless given"
    )
    verb.add_argument(
        "--search", metavar="NAME", help="a file of conf/search/; rescored if the model can, unless given, or its own"
    )
    verb.add_argument("--max-streams", type=_count, default=64, metavar="N", help="at once (default 64)")
    verb.add_argument("--max-per-address", type=_count, default=16, metavar="N", help="of one client (default 16)")
    verb.add_argument("--max-seconds", type=_count, default=14400, metavar="N", help="of a stream (default 14400)")
    verb.add_argument(
        "--resume-seconds", type=_count, default=15, metavar="N", help="to wait for a lost client (default 15)"
    )
    verb.add_argument("--idle-seconds", type=_count, default=60, metavar="N", help="without audio (default 60)")
    verb.add_argument(
        "--allow-origin", nargs="+", default=(), metavar="URL", help="pages that may connect beside this server's own"
    )
    verb.add_argument("--vad", action="store_true", help="hear speech only: silence costs no step of the model")
    verb.set_defaults(run=_lazy("serve", "serve"))


def _verb(
    verbs: argparse._SubParsersAction, common: argparse.ArgumentParser, name: str, does: str
) -> argparse.ArgumentParser:
    return verbs.add_parser(name, help=does, description=f"{does[0].upper()}{does[1:]}.", parents=[common])


def _lazy(module: str, function: str):
    """The work of a verb, imported when it is asked for: ``--help`` need not wait for torch."""

    def run(**options: object) -> int | None:
        home = __import__(f"speechkit.app.{module}", fromlist=[function])
        return getattr(home, function)(**options)

    return run


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 65535, but is {text}")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, but is {text}")
    return int(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be a number above 0 and below 1, but is {text}")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds, 0 or more, but is {text}")
    return value


def _milliseconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of milliseconds above 0, but is {text}")
    return value
