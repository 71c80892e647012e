"""docs/serving.md says what is true: its client works as written, and its tables name what there is."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import soundfile
from live import running
from overfit import Overfit

from speechkit.app import serve
from speechkit.app.cli import main
from speechkit.app.serve.stream import ERRORS, OUTBOX, REPEATED
from speechkit.app.serve.streams import RATES
from speechkit.session import Session

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()


def test_the_client_of_the_page_prints_the_words(overfit: Overfit, tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 24
    (tmp_path / "client.py").write_text(code)
    for channels in (1, 2):
        clip = overfit.clip(channels, 44100)
        soundfile.write(tmp_path / "a.wav", clip if channels == 1 else clip[:, None].repeat(2, 1), 44100)
        with running(Session(overfit.recogniser)) as server:
            argv = [sys.executable, "client.py", server.url, "a.wav"]
            ended = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=30)
        assert (ended.stdout, ended.stderr) == (overfit.text(channels) + "\n", "")


def test_the_page_names_every_error_rate_option_and_metric(
    overfit: Overfit, capsys: pytest.CaptureFixture[str]
) -> None:
    said = " ".join(PAGE.split())
    assert all(f"`{code}`" in PAGE for code in ERRORS)
    assert f"`sample_rate` is {', '.join(map(str, RATES[:-1]))} or {RATES[-1]} Hz" in said
    assert f"{OUTBOX} final texts wait" in said and f"The last {REPEATED} final texts" in said
    assert f"at most {serve.MESSAGE_BYTES >> 20} MiB" in said and f"that takes {serve.FLUSH:g} s at most" in said
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    options = re.findall(r"^  (--[\w-]+)", capsys.readouterr().out, re.MULTILINE)
    own = [option for option in options if option not in ("--debug", "--local")]  # these are every verb's
    assert len(own) >= 12 and all(f"`{option}`" in PAGE for option in own)
    with running(Session(overfit.recogniser)) as server:
        names = re.findall(r"^# TYPE (\w+)", httpx.get(f"{server.http}/metrics").text, re.MULTILINE)
    for name in names:
        assert f"`{name}" in PAGE or f"`_{name.split('_', 2)[2]}" in PAGE, name
