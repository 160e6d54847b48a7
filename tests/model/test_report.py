"""The report: one page by itself that says what data it is about and what the scores can be compared with."""

import re
from dataclasses import replace
from html import unescape

import pytest
from model_helpers import small_config
from report_helpers import RESULT, SCORES, conversations

from spikemo_model import SpikEmo
from spikemo_model.config import DSWAConfig, Preset, TrainingConfig
from spikemo_model.data import synthetic_corpus
from spikemo_model.experiment import summary
from spikemo_model.insight import measure
from spikemo_model.report import class_table, comparison, confused_pairs, format_table, score_table, write_report


def text_of(page: str) -> str:
    """What a reader sees."""
    return re.sub(r"\s+", " ", unescape(re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.DOTALL)))


def written(tmp_path, config, corpus, result=RESULT) -> str:
    """The page about an untrained model."""
    return written_with(tmp_path, config, corpus, measure(SpikEmo(config), corpus), result)


def written_with(tmp_path, config, corpus, insight, result=RESULT) -> str:
    """The page about what was measured."""
    path = write_report(tmp_path, result, Preset(config, TrainingConfig()), corpus, "made up", insight, SCORES)
    return path.read_text(encoding="utf-8")


def test_the_page_stands_alone_and_says_what_it_is_about(tmp_path):
    corpus = replace(conversations((10, 4)), notes=("Careful: <b>made up</b>.",))
    page = written(tmp_path, small_config(), corpus)
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert page.count("data:image/png;base64,") == 7
    for needed in (
        "59.50 % weighted F1", "77 utterances", "epoch 2 of 3", "Seed 3", "12,345 parameters", "random text",
        "nothing to compare with", "model.dswa.time_steps", "logistic regression", "Of the test dialogue d0",
        "synaptic operations", "4.6 pJ", "spiking, T = 4",
    ):  # fmt: skip
        assert needed in text_of(page), needed
    assert "With some of the modalities" not in page
    assert "<b>made up" not in page
    names = {"history", "confusion", "gates", "rates", "spikes_text", "spikes_audio", "spikes_visual"}
    assert {p.name for p in (tmp_path / "plots").iterdir()} == {f"{name}.png" for name in names}
    assert all((tmp_path / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in names)


def test_what_people_say_is_shown_as_text_and_not_run(tmp_path):
    said = "<script>alert('x')</script> & \"Hi\" " + "a" * 10_000
    corpus = conversations((10, 4), texts=(said,))
    test = tuple(replace(d, speakers=("<i>Joey</i>",) * len(d), id=f"<{d.id}>") for d in corpus.splits["test"])
    page = written(tmp_path, small_config(), replace(corpus, splits={**corpus.splits, "test": test}))
    assert "<script" not in page
    assert "<i>" not in page
    assert "<d0>" not in page
    assert "<i>Joey</i> <script>alert('x')</script> & \"Hi\"" in re.sub(
        r"\s+", " ", unescape(page.replace("</strong>", ""))
    )
    assert "a" * 301 not in text_of(page)


def test_errors_stand_with_their_dialogue_the_largest_first(tmp_path):
    corpus = conversations((4, 5, 6), texts=("first", "second"))
    config = small_config()
    insight = measure(SpikEmo(config), corpus)
    worst = insight.errors[0]
    page = text_of(written_with(tmp_path, config, corpus, insight))
    assert f"{worst.id}: {worst.error:.2f} over {len(worst.lines)} utterances" in page
    line = worst.lines[1]
    assert f"2 b second {line.label} {line.label_probability:.2f} {line.predicted} {line.probability:.2f}" in page
    places = [page.index(f"{dialogue.id}: {dialogue.error:.2f}") for dialogue in insight.errors]
    assert places == sorted(places)
    assert len(places) == 3


CASES = {
    "without spikes": (small_config(dswa=None), (12, 1)),
    "one modality": (small_config(modalities=("visual",), contexts=("gru",)), (12,)),
    "published, one utterance": (small_config(published_behaviour=True), (1, 1)),
    "modalities apart": (small_config(dswa=DSWAConfig(time_steps=2, depth=1, num_heads=2, shared=False)), (2, 3)),
}


@pytest.mark.parametrize(("config", "lengths"), CASES.values(), ids=CASES)
def test_every_model_has_a_report(config, lengths, tmp_path):
    result = RESULT if config.dswa else replace(RESULT, rates_before={}, rates_after={})
    page = written(tmp_path, config, conversations(lengths, modalities=tuple(config.modalities)), result)
    assert ("Operations and energy" in page) == (config.dswa is not None)
    spiking = 2 + len(config.modalities) if config.dswa else 0
    assert page.count("data:image/png;base64,") == 2 + spiking
    assert "largest errors" in page


def test_a_model_that_does_without_modalities_has_its_score_by_subset(tmp_path):
    config, corpus = small_config(modality_dropout=0.25), conversations((10, 4, 7))
    insight = measure(SpikEmo(config), corpus)
    page = text_of(written_with(tmp_path, config, corpus, insight))
    assert "probability 0.25 a step" in page
    for names, f1 in insight.subsets.items():
        assert f"{' + '.join(names)} {f1:.2f} " in page


def test_the_table_of_emotions_has_precision_recall_and_the_papers_numbers():
    confusion = [[0] * 7 for _ in range(7)]
    confusion[0][0], confusion[0][1], confusion[1][0], confusion[1][1] = 6, 2, 3, 1
    scores = replace(SCORES, confusion=confusion)
    table = class_table(scores, SCORES, replace(conversations((4,)), name="MELD"))
    assert table[0] == (
        "F1 on test, % (utterances)", "precision", "recall", "SpikEmo", "logistic regression", "paper",
    )  # fmt: skip
    assert table[1] == ("neutral (8)", "66.67", "75.00", "10.00", "10.00", "79.53")
    assert table[2] == ("surprise (4)", "33.33", "25.00", "11.00", "11.00", "58.40")
    assert table[3][:3] == ("fear (0)", "0.00", "0.00")
    assert table[-1] == ("weighted (12)", "55.56", "58.33", "59.50", "59.50", "65.92")


def test_confused_pairs_are_the_most_frequent_errors():
    confusion = [[0] * 7 for _ in range(7)]
    confusion[0][0], confusion[0][1], confusion[1][0], confusion[2][6] = 6, 2, 3, 1
    scores = replace(SCORES, confusion=confusion)
    pairs = [("surprise", "neutral", 3, 100.0), ("neutral", "surprise", 2, 25.0), ("fear", "anger", 1, 100.0)]
    assert confused_pairs(scores) == pairs
    assert confused_pairs(scores, count=1) == pairs[:1]


def test_the_papers_numbers_stand_beside_the_same_modalities_only():
    corpus = synthetic_corpus(4)
    renamed = replace(corpus, name="MELD")
    assert comparison(corpus) == ("The paper has no results on this data (synthetic): nothing to compare with.", None)
    assert comparison(renamed)[1] == 65.92
    assert comparison(renamed.select(["audio", "text"]))[1] == 62.22
    assert "says nothing about the model alone" in comparison(renamed)[0]
    rows = score_table(SCORES, None, renamed)
    assert rows[0] == ("F1 on test, %", "SpikEmo", "paper")
    assert rows[1] == ("neutral", "10.00", "79.53")
    assert rows[-1] == ("weighted", "59.50", "65.92")
    assert score_table(SCORES, SCORES, corpus)[-1] == ("weighted", "59.50", "59.50", "-")


def test_tables_are_aligned():
    lines = format_table([("class", "F1"), ("joy", "1.00"), ("surprise", "10.00")]).splitlines()
    assert lines == ["class        F1", "---------------", "joy        1.00", "surprise  10.00"]


def test_the_summary_has_each_seed_mean_and_deviation():
    assert summary([59.0, 60.0, 61.0]) == (
        "weighted F1 on test, 3 seeds: 59.00, 60.00, 61.00; mean 60.00, standard deviation 1.00"
    )


@pytest.mark.parametrize("name", ["MELD", "IEMOCAP"])
def test_the_papers_table_is_consistent(name):
    from spikemo_model.report import PAPER_CLASS_F1, PAPER_WEIGHTED_F1

    assert len(PAPER_WEIGHTED_F1[name]) == 7
    assert min(PAPER_CLASS_F1[name].values()) < max(PAPER_WEIGHTED_F1[name].values())
