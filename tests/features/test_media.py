"""Sound and pictures of clips: which samples, which frames, and what is wrong with a bad one."""

import wave

import av
import numpy as np
import pytest
from feature_helpers import write_clip

from spikemo_model.data import DataError
from spikemo_model.features.media import read_audio, read_frames


def grey(level: float) -> np.ndarray:
    return np.full((32, 32, 3), level, np.uint8)


def write_wav(path, samples, rate):
    """16-bit wav of [channels, samples]."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(samples))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples.T * 32767).round().astype("<i2").tobytes())
    return path


def test_a_wav_at_our_rate_is_decoded_to_its_own_samples(tmp_path):
    samples = np.random.default_rng(0).integers(-32768, 32768, 4_321)
    path = write_wav(tmp_path / "a.wav", samples[None] / 32767, 16_000)
    assert np.array_equal(read_audio(path), (samples / 32768).astype(np.float32))


def test_real_recordings_keep_their_length_and_loudness(recordings):
    for path in recordings:
        with wave.open(str(path)) as file:
            assert file.getframerate() == 22_050
            samples = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32768
        sound = read_audio(path)
        assert len(sound) / 16_000 == pytest.approx(len(samples) / 22_050, abs=0.002)
        assert sound.std() == pytest.approx(samples.std(), rel=0.05)


def test_other_rates_and_channels_become_one_at_16_khz(tmp_path):
    tone = np.sin(2 * np.pi * 440 * np.arange(44_100) / 44_100) * 0.8
    sound = read_audio(write_wav(tmp_path / "a.wav", np.stack([tone, 0 * tone]), 44_100))
    assert abs(len(sound) - 16_000) <= 32
    spectrum = np.abs(np.fft.rfft(sound[:16_000], 16_000))
    assert spectrum.argmax() == 440
    assert np.abs(sound[4_000:12_000]).max() == pytest.approx(0.4, abs=0.02)  # the mean of a tone and silence


def test_flac_and_a_clips_sound_track_are_read(data, tmp_path):
    path = sorted((data / "audio").glob("*.flac"))[0]
    with av.open(path) as container:
        seconds = container.duration / 1e6
    sound = read_audio(path)
    assert len(sound) / 16_000 == pytest.approx(seconds, abs=0.01)
    assert 0.001 < np.sqrt((sound**2).mean()) < 0.5
    tone = 0.5 * np.sin(2 * np.pi * 300 * np.arange(32_000) / 16_000)
    track = read_audio(write_clip(tmp_path / "a.mp4", [grey(0)] * 20, sound=tone))
    assert np.abs(np.fft.rfft(track[8_000:24_000])).argmax() == 300


@pytest.mark.parametrize(
    ("count", "start", "end", "expected"),
    [
        (5, 0.0, None, [3, 9, 15, 21, 27]),
        (1, 0.0, None, [15]),
        (2, 1.0, 2.0, [12, 17]),
        (2, 2.0, 99.0, [22, 27]),
        (60, 0.0, None, list(range(30))),
    ],
)
def test_pictures_are_those_in_the_middle_of_equal_parts(tmp_path, count, start, end, expected):
    path = write_clip(tmp_path / "a.mp4", [grey(16 + 7 * i) for i in range(30)], lossless=True)
    frames = read_frames(path, count, start, end)
    assert frames[0].shape == (32, 32, 3)
    levels = [float(frame.mean()) for frame in frames]
    assert levels == pytest.approx([16 + 7 * i for i in expected], abs=3)


def test_a_clip_of_305_s_gives_pictures_of_all_of_it(tmp_path):
    path = write_clip(tmp_path / "a.mp4", [grey(3 * i) for i in range(61)], fps=0.2, lossless=True)
    levels = [float(frame.mean()) for frame in read_frames(path, 20)]
    assert levels == pytest.approx([3 * int((i + 0.5) * 61 / 20) for i in range(20)], abs=3)


def test_a_single_picture_is_enough(tmp_path):
    (frame,) = read_frames(write_clip(tmp_path / "a.mp4", [grey(99)]), 20)
    assert float(frame.mean()) == pytest.approx(99, abs=3)


def test_bad_files_are_named(tmp_path, recordings):
    noise = tmp_path / "noise.mp4"
    noise.write_bytes(np.random.default_rng(0).bytes(5_000))
    (tmp_path / "empty.mp4").touch()
    for read in (read_audio, lambda path: read_frames(path, 20)):
        with pytest.raises(DataError, match=r"there is no .*absent\.mp4"):
            read(tmp_path / "absent.mp4")
        with pytest.raises(DataError, match=r"noise\.mp4 cannot be decoded \(.*\)\. Copy the file again"):
            read(noise)
        with pytest.raises(DataError, match=r"empty\.mp4 cannot be decoded"):
            read(tmp_path / "empty.mp4")
    whole = write_clip(tmp_path / "whole.mp4", [grey(i) for i in range(30)]).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut\.mp4 cannot be decoded"):
        read_frames(tmp_path / "cut.mp4", 20)
    with pytest.raises(DataError, match="has no pictures"):
        read_frames(recordings[0], 20)
    with pytest.raises(DataError, match=r"whole\.mp4 has no sound track"):
        read_audio(tmp_path / "whole.mp4")
    with pytest.raises(DataError, match=r"no pictures between 9\.00 s and"):
        read_frames(tmp_path / "whole.mp4", 20, 9.0, 10.0)
