"""Other projects' pickles: read without running anything, refused by name, imported whole or not at all."""

import pickle
import pickletools

import numpy as np
import pytest

from spikemo_model.config import IEMOCAP_EMOTIONS, MELD_EMOTIONS
from spikemo_model.data import DataError, import_legacy_features, load_corpus
from spikemo_model.data.legacy import load_legacy_pickle

rng = np.random.default_rng(0)


def dump(path, value, protocol=2):
    """Pickle a value."""
    path.write_bytes(pickle.dumps(value, protocol=protocol))


def multiemo(folder, name="MELD", kind=np.ndarray, protocol=2):
    """A folder in MultiEMO's layout: 1200 tiny MELD dialogues, or 30 of IEMOCAP."""
    ids = list(range(1030, 1050)) + list(range(1153, 1158)) if name == "MELD" else [f"Ses0{i}" for i in range(30)]
    lengths = {i: 1 + n % 4 for n, i in enumerate(ids)}
    folder.mkdir(exist_ok=True)
    for modality, width in (("Text", 5), ("Audio", 4), ("Visual", 3)):
        features = {i: rng.standard_normal((n, width)).astype(np.float32) for i, n in lengths.items()}
        if kind is list:
            features = {i: list(rows) for i, rows in features.items()}
        dump(folder / f"{modality}Features.pkl", features, protocol)
    if name == "MELD":
        speakers = {i: np.eye(9)[np.arange(n) % 2] for i, n in lengths.items()}
    else:
        speakers = {i: ["M" if j % 2 else "F" for j in range(n)] for i, n in lengths.items()}
    labels = {i: [j % 6 for j in range(n)] for i, n in lengths.items()}
    train, test = (ids[:-5], ids[-5:]) if name == "MELD" else (set(ids[:-5]), set(ids[-5:]))
    fields = [{}, speakers, labels, {}, {}, {}, {}, train, test, *([{}] if name == "MELD" else [])]
    dump(folder / "Speakers.pkl", tuple(fields), protocol)
    return lengths


@pytest.mark.parametrize("kind", [np.ndarray, list])
@pytest.mark.parametrize("protocol", [2, 4])
def test_multiemos_meld_is_imported_with_the_official_validation_split(tmp_path, kind, protocol):
    lengths = multiemo(tmp_path / "source", "MELD", kind, protocol)
    corpus = import_legacy_features(tmp_path / "source", tmp_path / "store")
    assert corpus.classes == MELD_EMOTIONS
    assert corpus.widths == {"text": 5, "audio": 4, "visual": 3}
    assert [d.id for d in corpus.splits["valid"]] == [str(i) for i in range(1039, 1050)]
    assert [d.id for d in corpus.splits["train"]] == [str(i) for i in range(1030, 1039)]
    assert [len(d) for d in corpus.splits["test"]] == [lengths[i] for i in range(1153, 1158)]
    assert corpus.splits["train"][1].speakers == ("speaker 0", "speaker 1")
    stored = load_corpus(tmp_path / "store").splits["test"][2]
    raw = pickle.loads((tmp_path / "source" / "AudioFeatures.pkl").read_bytes())
    assert np.array_equal(stored.features["audio"].numpy(), np.stack(list(raw[1155])))


def test_multiemos_iemocap_is_imported_with_a_drawn_validation_split(tmp_path):
    multiemo(tmp_path / "source", "IEMOCAP")
    corpus = import_legacy_features(tmp_path / "source", tmp_path / "store", seed=1)
    assert corpus.classes == IEMOCAP_EMOTIONS
    assert {split: len(d) for split, d in corpus.splits.items()} == {"train": 23, "valid": 2, "test": 5}
    assert "drawn with seed 1" in corpus.notes[0]
    assert corpus.splits["train"][0].speakers[0] in ("F", "M")
    again = import_legacy_features(tmp_path / "source", tmp_path / "again", seed=1)
    assert [d.id for d in again.splits["valid"]] == [d.id for d in corpus.splits["valid"]]


def test_mmgcns_single_file_is_imported(tmp_path):
    ids = [f"Ses{i}" for i in range(20)]
    features = [{i: [rng.standard_normal(w) for _ in range(3)] for i in ids} for w in (5, 4, 3)]
    speakers, labels = {i: ["M", "F", "M"] for i in ids}, {i: [0, 5, 2] for i in ids}
    fields = ({}, speakers, labels, *features, {}, ids[:15], ids[15:])
    dump(tmp_path / "IEMOCAP_features.pkl", fields)
    corpus = import_legacy_features(tmp_path, tmp_path / "store")
    assert corpus.about == dict.fromkeys(("text", "audio", "visual"), "MMGCN's feature files")
    wanted = np.stack(features[1]["Ses17"]).astype(np.float32)
    assert np.array_equal(corpus.splits["test"][2].features["audio"].numpy(), wanted)


def test_arrays_of_every_plain_kind_survive(tmp_path):
    values = {
        "f": np.arange(6, dtype=np.float64).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
        "big": np.arange(4, dtype=">i4"),
        "bool": np.array([True, False]),
        "scalar": np.float32(2.5),
        "objects": np.array(["a", "b"], dtype=object),
        "text": np.array(["yes", "no"]),
        "set": {1, 2},
        "empty": np.zeros((0, 3)),
    }
    for protocol in (2, 3, 4, 5):
        path = tmp_path / f"{protocol}.pkl"
        dump(path, values, protocol)
        read = load_legacy_pickle(path)
        for name, value in values.items():
            assert np.array_equal(np.asarray(read[name], dtype=np.asarray(value).dtype), value), name


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_code_in_a_pickle_is_refused_by_name_and_nothing_is_left(tmp_path):
    multiemo(tmp_path / "source")
    dump(tmp_path / "source" / "VisualFeatures.pkl", {0: Bomb(tmp_path / "ran")})
    with pytest.raises(
        DataError, match=r"VisualFeatures\.pkl holds the name (io|_io|builtins|__builtin__)\.open, which is refused"
    ):
        import_legacy_features(tmp_path / "source", tmp_path / "store")
    assert not (tmp_path / "ran").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize(
    "program",
    [
        b"cos\nsystem\n(S'true'\ntR.",
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cbuiltins\ngetattr\n(S'a'\nS'b'\ntR.",
        b"ctorch._utils\n_rebuild_tensor\n(tR.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"c_codecs\nencode\n(S'x'\nS'zlib'\ntR.",
        b"cnumpy\ndtype\n(S'i4,(9999999,9999999)f8'\ntR.",
        b"cnumpy\ndtype\n(S'V8'\ntR.",
        b"cnumpy.core.multiarray\n_reconstruct\n(tR(I1\n(I-1\ntcnumpy\ndtype\n(S'f4'\ntRI00\nS'x'\ntb.",
    ],
)
def test_programs_are_refused(tmp_path, program):
    assert list(pickletools.genops(program))
    (tmp_path / "evil.pkl").write_bytes(program)
    with pytest.raises(DataError, match=r"evil\.pkl (holds|cannot be read)"):
        load_legacy_pickle(tmp_path / "evil.pkl")


def test_shared_and_circular_parts_do_not_blow_up(tmp_path):
    nested = [1]
    for _ in range(60):
        nested = [nested, nested]
    dump(tmp_path / "laughs.pkl", nested)
    assert len(load_legacy_pickle(tmp_path / "laughs.pkl")) == 2
    circular = []
    circular.append(circular)
    dump(tmp_path / "circular.pkl", circular)
    with pytest.raises(DataError, match="cannot be read"):
        load_legacy_pickle(tmp_path / "circular.pkl")


def test_damaged_folders_are_named(tmp_path):
    with pytest.raises(DataError, match=r"must hold MultiEMO's Speakers\.pkl"):
        import_legacy_features(tmp_path, tmp_path / "store")
    source = tmp_path / "source"
    multiemo(source)
    text = (source / "TextFeatures.pkl").read_bytes()
    (source / "TextFeatures.pkl").write_bytes(text[:200])
    with pytest.raises(DataError, match=r"TextFeatures\.pkl cannot be read"):
        import_legacy_features(source, tmp_path / "store")
    features = pickle.loads(text)
    dump(source / "TextFeatures.pkl", {i: x for i, x in features.items() if i != 1040})
    with pytest.raises(DataError, match="MELD dialogue 1040 has no text"):
        import_legacy_features(source, tmp_path / "store")
    dump(source / "TextFeatures.pkl", {**features, 1040: features[1040][:, :4]})
    with pytest.raises(DataError, match="dialogue 1040: text features must be"):
        import_legacy_features(source, tmp_path / "store")
    (source / "TextFeatures.pkl").write_bytes(text)
    (source / "AudioFeatures.pkl").unlink()
    with pytest.raises(DataError, match=r"there is no .*AudioFeatures\.pkl"):
        import_legacy_features(source, tmp_path / "store")
    dump(source / "Speakers.pkl", [1, 2, 3])
    with pytest.raises(DataError):
        import_legacy_features(source, tmp_path / "store")
    assert not (tmp_path / "store").exists()
    (tmp_path / "store").mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        import_legacy_features(source, tmp_path / "store")
