"""Files in and out, and one sentence for everything that can be wrong with one."""

from __future__ import annotations

import logging
import resource
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from speechkit import audio

RATE = 16000


@pytest.fixture
def tone() -> np.ndarray:
    time = np.arange(5 * RATE) / RATE
    return (0.4 * np.sin(2 * np.pi * 220 * time) + 0.01 * np.random.default_rng(0).standard_normal(len(time))).astype(
        "f4"
    )


def _error(call) -> str:
    with pytest.raises(audio.AudioError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and message[-1] in ".c", message
    return message


@pytest.mark.parametrize(
    ("name", "subtype", "tolerance"),
    [
        ("a.wav", "PCM_16", 1e-4),
        ("a.wav", "PCM_24", 1e-6),
        ("a.wav", "PCM_32", 1e-6),
        ("a.wav", "FLOAT", 0),
        ("a.wav", "DOUBLE", 0),
        ("a.wav", "ULAW", 0.02),
        ("a.flac", "PCM_16", 1e-4),
        ("a.flac", "PCM_24", 1e-6),
        ("a.aiff", "PCM_16", 1e-4),
        ("a.ogg", "VORBIS", 0.1),
        ("a.ogg", "OPUS", 0.2),
        ("a.mp3", "MPEG_LAYER_III", 0.2),
    ],
)
def test_every_format_is_read(tmp_path: Path, tone: np.ndarray, name: str, subtype: str, tolerance: float) -> None:
    soundfile.write(tmp_path / name, tone, RATE, subtype=subtype)
    samples, rate = audio.read(tmp_path / name)
    assert (rate, samples.dtype, samples.shape) == (RATE, np.float32, tone.shape)
    assert np.abs(samples - tone).max() <= tolerance
    about = audio.info(tmp_path / name)
    assert (about.sample_rate, about.channels, about.frames, about.seconds) == (RATE, 1, len(tone), 5.0)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 96000, 192000])
def test_every_rate_is_reported(tmp_path: Path, tone: np.ndarray, rate: int) -> None:
    soundfile.write(tmp_path / "a.flac", tone, rate)
    assert audio.read(tmp_path / "a.flac")[1] == rate
    assert audio.info(tmp_path / "a.flac").seconds == len(tone) / rate


@pytest.mark.parametrize("channels", [2, 6])
def test_channels_are_averaged_with_one_notice_a_file(tmp_path: Path, caplog, channels: int) -> None:
    many = np.random.default_rng(0).uniform(-0.5, 0.5, (RATE, channels))
    soundfile.write(tmp_path / "a.wav", many, RATE, subtype="FLOAT")
    with caplog.at_level(logging.INFO, logger="speechkit"):
        for _ in range(3):
            samples, _ = audio.read(tmp_path / "a.wav")
            list(audio.blocks(tmp_path / "a.wav", 0.1)[1])
    np.testing.assert_allclose(samples, many.mean(axis=1), atol=1e-6)
    (notice,) = caplog.messages
    assert "a.wav" in notice and f"{channels} channels" in notice and "mono" in notice


@settings(max_examples=30, deadline=None)
@given(start=st.floats(0, 4.9), duration=st.floats(0.001, 6))
def test_a_section_is_a_slice_of_the_whole(tmp_path_factory, start: float, duration: float) -> None:
    path = tmp_path_factory.getbasetemp() / "section.flac"
    if not path.exists():
        soundfile.write(path, np.random.default_rng(0).uniform(-1, 1, 5 * RATE), RATE)
    whole, _ = audio.read(path)
    part, _ = audio.read(path, start=start, duration=duration)
    first = round(start * RATE)
    np.testing.assert_array_equal(part, whole[first : first + max(1, round(duration * RATE))])


@pytest.mark.parametrize(("name", "subtype"), [("a.flac", None), ("a.ogg", "VORBIS"), ("a.mp3", None)])
def test_blocks_joined_are_the_whole_file(tmp_path: Path, tone: np.ndarray, name: str, subtype: str | None) -> None:
    soundfile.write(tmp_path / name, tone, RATE, subtype=subtype)
    rate, blocks = audio.blocks(tmp_path / name, 0.37)
    pieces = list(blocks)
    assert rate == RATE and {len(p) for p in pieces[:-1]} == {round(0.37 * RATE)}
    np.testing.assert_allclose(np.concatenate(pieces), audio.read(tmp_path / name)[0], atol=1e-6)


def test_blocks_of_a_long_file_need_little_memory(tmp_path: Path) -> None:
    with soundfile.SoundFile(tmp_path / "long.wav", "w", RATE, 1) as file:
        for _ in range(20):
            file.write(np.zeros(60 * RATE, dtype=np.int16))
    tracemalloc.start()
    try:
        seconds = sum(len(block) for block in audio.blocks(tmp_path / "long.wav", 1.0)[1]) / RATE
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert seconds == 1200 and peak < 2_000_000


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "new/folder/a.FLAC"])
def test_what_is_written_is_read_back(tmp_path: Path, tone: np.ndarray, name: str) -> None:
    audio.write(tmp_path / name, tone * 3, 22050)
    samples, rate = audio.read(tmp_path / name)
    assert rate == 22050
    np.testing.assert_allclose(samples, np.clip(tone * 3, -1, 1), atol=1e-4)
    assert [p.name for p in (tmp_path / name).parent.iterdir()] == [Path(name).name]


def test_a_full_disk_loses_nothing(tmp_path: Path, tone: np.ndarray) -> None:
    path = tmp_path / "a.wav"
    audio.write(path, tone[:1000], RATE)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        message = _error(lambda: audio.write(path, tone, RATE))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "a.wav" in message and "free some space" in message
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.wav"]


def test_only_finite_mono_sound_is_written_and_only_as_flac_or_wav(tmp_path: Path, tone: np.ndarray) -> None:
    bad = tone.copy()
    bad[8000] = np.inf
    for name, samples, words in [
        ("a.mp3", tone, ["must end in .flac or .wav", "'.mp3'"]),
        ("a.wav", tone[:0], ["N > 0", "[0]"]),
        ("a.wav", np.stack([tone, tone]), ["[N]", "[2, 80000]"]),
        ("a.wav", bad, ["sample 8000", "0.500 s", "inf"]),
    ]:
        message = _error(lambda name=name, samples=samples: audio.write(tmp_path / name, samples, RATE))
        assert name in message and all(word in message for word in words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("look", [audio.info, audio.read, lambda path: audio.blocks(path, 1.0)])
def test_a_file_that_is_not_sound_is_named_with_the_remedy(tmp_path: Path, tone: np.ndarray, look) -> None:
    (tmp_path / "folder.wav").mkdir()
    (tmp_path / "zero.wav").touch()
    (tmp_path / "text.wav").write_text("not a sound\n" * 100)
    soundfile.write(tmp_path / "header.wav", tone[:0], RATE)
    for name, words in [
        ("missing.wav", ["does not exist", "check the path"]),
        ("folder.wav", ["is a folder", "name a file"]),
        ("zero.wav", ["empty (0 bytes)"]),
        ("header.wav", ["0 frames", "leave it out"]),
        ("text.wav", ["Format not recognised", "ffmpeg -i"]),
    ]:
        message = _error(lambda name=name: look(tmp_path / name))
        assert name in message and all(word in message for word in words), message


@pytest.mark.parametrize(
    ("name", "subtype"),
    [("a.wav", "PCM_16"), ("a.wav", "PCM_24"), ("a.wav", "FLOAT"), ("a.aiff", None), ("a.au", None), ("a.flac", None),
     ("a.mp3", None)],
)  # fmt: skip
@pytest.mark.parametrize("share", [0.5, 0.99])
def test_a_cut_file_says_how_many_seconds_are_there(tmp_path: Path, tone, name: str, subtype, share: float) -> None:
    path = tmp_path / name
    soundfile.write(path, tone, RATE, subtype=subtype)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    for look in (lambda: audio.read(path), lambda: list(audio.blocks(path, 0.5)[1])):
        message = _error(look)
        assert name in message and "5.00 s its header promises" in message
        there = float(message.split("cut short or damaged after ")[1].split(" s")[0])
        assert 5 * share - 0.5 <= there <= 5 * share + 0.01
    if path.suffix in (".wav", ".aiff", ".au"):
        assert "cut short" in _error(lambda: audio.info(path))


def test_the_part_before_a_cut_can_still_be_read(tmp_path: Path, tone: np.ndarray) -> None:
    path = tmp_path / "a.flac"
    soundfile.write(path, tone, RATE)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    np.testing.assert_allclose(audio.read(path, duration=1.0)[0], tone[:RATE], atol=1e-4)


def test_a_wav_written_into_a_pipe_is_not_called_cut(tmp_path: Path, tone: np.ndarray) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, tone, RATE)
    for unknown in (b"\xff\xff\xff\xff", b"\x00\xf0\xff\x7f"):
        content = bytearray(path.read_bytes())
        content[4:8] = content[40:44] = unknown
        path.write_bytes(content)
        np.testing.assert_allclose(audio.read(path)[0], tone, atol=1e-4)


def test_a_flac_without_a_length_is_named_with_the_remedy(tmp_path: Path, tone: np.ndarray) -> None:
    path = tmp_path / "a.flac"
    soundfile.write(path, tone, RATE)
    content = bytearray(path.read_bytes())
    content[21] &= 0xF0
    content[22:26] = b"\0" * 4
    path.write_bytes(content)
    message = _error(lambda: audio.read(path))
    assert "a.flac" in message and "length" in message and "ffmpeg" in message


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_numbers_are_located(tmp_path: Path, tone: np.ndarray, bad: float) -> None:
    stereo = np.stack([tone, tone], axis=1)
    stereo[40000:40010, 1] = bad
    soundfile.write(tmp_path / "a.wav", stereo, RATE, subtype="FLOAT")
    for look in (audio.read, lambda path: list(audio.blocks(path, 0.5)[1]), lambda path: audio.read(path, start=1.0)):
        message = _error(lambda look=look: look(tmp_path / "a.wav"))
        assert all(word in message for word in ["a.wav", "sample 40000", "2.500 s", str(bad), "export it again"])
    assert len(audio.read(tmp_path / "a.wav", duration=2.0)[0]) == 2 * RATE


def test_a_section_outside_the_file_is_refused(tmp_path: Path, tone: np.ndarray) -> None:
    soundfile.write(tmp_path / "a.wav", tone, RATE)
    assert "5.000 s long" in _error(lambda: audio.read(tmp_path / "a.wav", start=5.0))
    assert "but is -1" in _error(lambda: audio.read(tmp_path / "a.wav", start=-1.0))
    assert "duration is 0" in _error(lambda: audio.read(tmp_path / "a.wav", duration=0.0))
    with pytest.raises(ValueError, match="at least one sample"):
        audio.blocks(tmp_path / "a.wav", 0.0)


def test_real_recordings_are_read_whole(recordings: Path) -> None:
    for name in ["fsdd", "speechocean762_more", "librosa_examples", "rir_noise_multimic", "cathy_fullband"]:
        for path in sorted((recordings / name / "audio").rglob("*.*"))[:5]:
            samples, rate = audio.read(path)
            assert len(samples) == audio.info(path).frames and rate >= 16000 and np.isfinite(samples).all()
