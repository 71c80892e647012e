"""Files that are there whole or not at all, whatever stops the one who writes them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from speechkit.files import replacing


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "folder" / "file.txt"
    with replacing(path) as draft:
        draft.write_text("old")
    return path


def test_a_draft_takes_the_place_of_the_file_and_is_gone(old: Path) -> None:
    with replacing(old) as draft:
        draft.write_text("new")
        assert old.read_text() == "old"
    assert old.read_text() == "new" and list(old.parent.iterdir()) == [old]


@pytest.mark.parametrize("fault", [OSError("No space left on device"), KeyboardInterrupt()])
def test_a_fault_in_the_middle_leaves_the_old_file_and_no_draft(old: Path, fault: BaseException) -> None:
    with pytest.raises(type(fault)), replacing(old) as draft:
        draft.write_text("ne")
        raise fault
    assert old.read_text() == "old" and list(old.parent.iterdir()) == [old]


def test_a_draft_that_was_never_written_leaves_the_old_file(old: Path) -> None:
    with pytest.raises(FileNotFoundError), replacing(old):
        pass
    assert old.read_text() == "old"


def test_a_killed_process_leaves_the_old_file(old: Path) -> None:
    program = """
import os, pathlib, sys, speechkit.files
with speechkit.files.replacing(pathlib.Path(sys.argv[1])) as draft:
    draft.write_text("ne")
    os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", program, old], env=os.environ).returncode == -signal.SIGKILL
    assert old.read_text() == "old" and len([*old.parent.glob(".file.txt.*.part")]) == 1


def test_two_that_write_one_file_at_once_never_mix(old: Path) -> None:
    with replacing(old) as first:
        first.write_text("fir")
        with replacing(old) as second:
            second.write_text("second")
        first.write_text("first")
        assert old.read_text() == "second"
    assert old.read_text() == "first"
