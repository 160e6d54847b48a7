"""openSMILE's functionals of real and of strange recordings, and their reduction."""

from dataclasses import replace

import numpy as np
import opensmile
import pytest
import torch
from feature_helpers import write_clip

from spikemo_model.data import DataError, standardise, synthetic_corpus
from spikemo_model.data.corpus import reduced_by
from spikemo_model.features.audio import functionals, reduce_width
from spikemo_model.features.media import read_audio


@pytest.fixture(scope="module")
def smile():
    return opensmile.Smile(opensmile.FeatureSet.ComParE_2016, opensmile.FeatureLevel.Functionals)


def test_real_recordings_give_the_6373_functionals_of_their_samples(recordings, smile):
    x = functionals(recordings[0])
    assert x.shape == (6373,)
    expected = smile.process_signal(read_audio(recordings[0]), 16_000).to_numpy()[0]
    assert np.array_equal(x.numpy(), expected)
    assert not torch.equal(x, functionals(recordings[1]))


def test_flac_at_our_rate_gives_what_opensmile_reads_itself(data, smile):
    for path in sorted((data / "audio").glob("*.flac")):
        assert np.array_equal(functionals(path).numpy(), smile.process_file(str(path)).to_numpy()[0])


def test_another_rate_and_a_sound_track_keep_pitch_and_loudness(recordings, smile, tmp_path):
    names = ["F0final_sma_quartile2", "F0final_sma_quartile3", "pcm_RMSenergy_sma_amean"]
    kept = [smile.feature_names.index(name) for name in names]
    expected = smile.process_file(str(recordings[0])).to_numpy()[0, kept]  # at 22 050 Hz
    assert 60 < expected[0] < 400
    assert functionals(recordings[0])[kept].numpy() == pytest.approx(expected, rel=0.05)
    track = write_clip(tmp_path / "a.mp4", [], sound=read_audio(recordings[0]))
    assert functionals(track)[kept].numpy() == pytest.approx(expected, rel=0.05)


def test_silence_is_measured_and_too_little_sound_is_an_error(tmp_path, smile):
    silence = functionals(write_clip(tmp_path / "silent.mp4", [], sound=np.zeros(16_000)))
    assert silence.isfinite().all()
    assert float(silence[smile.feature_names.index("pcm_RMSenergy_sma_amean")]) == pytest.approx(0, abs=1e-6)
    with pytest.raises(DataError, match=r"empty\.wav has 0\.000 s of sound; openSMILE needs 0\.06 s"):
        functionals(write_wav(tmp_path / "empty.wav", 0))
    with pytest.raises(DataError, match=r"short\.wav has 0\.059 s"):
        functionals(write_wav(tmp_path / "short.wav", 950))
    assert functionals(write_wav(tmp_path / "least.wav", 960)).isfinite().all()


def test_305_s_are_measured_whole(tmp_path, smile):
    loud_at_the_end = np.zeros(305 * 16_000)
    loud_at_the_end[-16_000:] = 0.5 * np.sin(np.arange(16_000) / 5)
    x = functionals(write_wav(tmp_path / "long.wav", loud_at_the_end))
    peak = smile.feature_names.index("pcm_RMSenergy_sma_maxPos")
    assert float(x[peak]) > 300 / 305


def write_wav(path, sound):
    """16-bit wav at 16 kHz of samples, or of so many zeros."""
    import soundfile

    soundfile.write(path, np.zeros(sound) if isinstance(sound, int) else sound, 16_000)
    return path


def test_a_reduction_is_fitted_on_train_alone_and_keeps_the_most_variance():
    corpus = standardise(synthetic_corpus(40), ["audio"])
    reduced = reduce_width(corpus, "audio", 5)
    train, own = (torch.cat([d.features["audio"] for d in c.splits["train"]]) for c in (corpus, reduced))
    assert reduced.widths["audio"] == 5
    assert reduced.widths["text"] == corpus.widths["text"]
    covariance = own.double().T.cov()
    torch.testing.assert_close(covariance, covariance.diag().diag(), atol=1e-4, rtol=0)
    largest = torch.linalg.eigvalsh(train.double().T.cov()).flip(0)[:5]
    torch.testing.assert_close(covariance.diag(), largest, rtol=1e-3, atol=0)
    doubled = tuple(
        replace(d, features={**d.features, "audio": 2 * d.features["audio"]}) for d in corpus.splits["test"]
    )
    other = reduce_width(replace(corpus, splits={**corpus.splits, "test": doubled}), "audio", 5)
    assert torch.equal(other.splits["train"][0].features["audio"], reduced.splits["train"][0].features["audio"])
    assert reduced.standardised.keys() == {"audio"}  # what the reduction is after
    own = reduced_by(corpus.splits["test"][0].features["audio"], reduced.reduced["audio"])
    assert torch.equal(own, reduced.splits["test"][0].features["audio"])
    assert reduced.about["audio"].endswith("reduced to 5 by PCA on train")
    assert reduced.extractors["audio"]["reduced_to"] == 5


def test_a_width_that_cannot_be_had_is_an_error():
    corpus = synthetic_corpus(8)
    with pytest.raises(
        ValueError, match=r"width must be 1 \.\.\. \d+ for \d+ training utterances x \d+ audio .*got 999"
    ):
        reduce_width(corpus, "audio", 999)
    reduced = reduce_width(corpus, "audio", 3)
    with pytest.raises(ValueError, match="audio is reduced already"):
        reduce_width(reduced, "audio", 2)
    with pytest.raises(DataError, match=r"audio is reduced already\. Standardise before"):
        standardise(reduced, ["text", "audio"])
