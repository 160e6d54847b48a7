"""The report: one page by itself that says what data it is about and what the scores can be compared with."""

import re
from dataclasses import replace
from html import unescape

import pytest
from model_helpers import small_config

from spikemo_model.config import MELD_EMOTIONS, Preset, TrainingConfig
from spikemo_model.data import synthetic_corpus
from spikemo_model.evaluation import Scores
from spikemo_model.experiment import summary
from spikemo_model.report import comparison, format_table, score_table, write_report
from spikemo_model.training import RunResult

SCORES = Scores(
    weighted_f1=59.5,
    accuracy=61.0,
    class_f1={name: 10.0 + i for i, name in enumerate(MELD_EMOTIONS)},
    confusion=[[5 if i == j else 1 for j in range(7)] for i in range(7)],
    utterances=77,
)
RESULT = RunResult(
    seed=3,
    best_epoch=1,
    parameters=12345,
    valid=replace(SCORES, weighted_f1=57.0),
    test=SCORES,
    history=[{"epoch": e, "train_total": 2.0 - e / 2, "valid_weighted_f1": 50.0 + e} for e in range(3)],
    rates_before={"dswa.shared.encoder": 0.3},
    rates_after={"dswa.shared.encoder": 0.2},
    seconds=90.0,
)


def test_the_page_stands_alone_and_says_what_it_is_about(tmp_path):
    corpus = replace(synthetic_corpus(8), notes=("Careful: <b>made up</b>.",))
    preset = Preset(small_config(), TrainingConfig())
    path = write_report(tmp_path, RESULT, preset, corpus, "synthetic conversations, NOT MELD results", SCORES)
    page = path.read_text(encoding="utf-8")
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert page.count("data:image/png;base64,") == 3
    text = unescape(re.sub(r"<[^>]+>", " ", page))
    for needed in (
        "59.50 % weighted F1", "77 utterances", "epoch 2 of 3", "Seed 3", "12,345 parameters",
        "NOT MELD results", "synthetic, 64-d", "nothing to compare with", "model.dswa.time_steps",
        "logistic regression",
    ):  # fmt: skip
        assert needed in re.sub(r"\s+", " ", text), needed
    assert "<b>made up" not in page
    names = sorted(p.name for p in (tmp_path / "plots").iterdir())
    assert names == ["confusion_matrix.png", "firing_rates.png", "loss_and_validation_score.png"]
    assert all((tmp_path / "plots" / n).read_bytes().startswith(b"\x89PNG") for n in names)


def test_a_model_without_spikes_has_a_report_too(tmp_path):
    result = replace(RESULT, rates_before={}, rates_after={})
    write_report(tmp_path, result, Preset(small_config(dswa=None), TrainingConfig()), synthetic_corpus(8), "here")
    assert (tmp_path / "report.html").is_file()


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
