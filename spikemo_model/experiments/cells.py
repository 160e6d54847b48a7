"""The experiments: which configurations each compares, and what the paper reports for them."""

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from typing import Any, NamedTuple

from spikemo_model.config import FusionConfig, ModalityConfig, Preset, compact, iemocap, meld
from spikemo_model.data.corpus import Corpus
from spikemo_model.report import PAPER_WEIGHTED_F1

# Of the published weight of the correlation loss; see `base`.
_CORR_SCALE = 1e-3
# The weights of MultiEMO's code, by default.
_MULTIEMO_LOSS = {
    "ce_weight": 0.3,
    "dice_weight": 0.0,
    "corr_weight": 0.3 * _CORR_SCALE,
    "contrastive_weight": 0.4,
}


class Cell(NamedTuple):
    """One configuration of an experiment.

    Args:
        name: As the table shows it.
        preset: The model and how to train it; its modalities are those that are read.
        paper: Weighted F1 that the paper reports, in percent, by name of the data.
    """

    name: str
    preset: Preset
    paper: dict[str, float]


class Experiment(NamedTuple):
    """Configurations to compare; the first is what the others are tested against.

    Args:
        title: Heading of its table.
        cells: The configurations.
        note: What the reader must know of them.
    """

    title: str
    cells: list[Cell]
    note: str


def base(corpus: Corpus, epochs: int | None = None, batch_size: int | None = None) -> Preset:
    """`compact` with the paper's three losses at the paper's weights; what every experiment varies.

    But for the correlation loss, which has a thousandth: Soft-HGR sums over all pairs of D features (the authors'
    code divides by the number of utterances once more), and at the paper's weight it is least where features are
    constant, and training ends there. The experiment "losses" shows it.

    Args:
        corpus: Gives widths and classes; IEMOCAP has loss weights of its own, other data those of MELD.
        epochs: Instead of the preset's.
        batch_size: The same, in dialogues.
    """
    model, training = compact(corpus.widths, corpus.classes)
    published = (iemocap() if corpus.name == "IEMOCAP" else meld()).training.loss
    loss = replace(
        training.loss,
        ce_weight=published.ce_weight,
        dice_weight=published.dice_weight,
        corr_weight=published.corr_weight * _CORR_SCALE,
    )
    training = replace(
        training, loss=loss, epochs=epochs or training.epochs, batch_size=batch_size or training.batch_size
    )
    return Preset(model, training)


def _paper(meld: float, iemocap: float) -> dict[str, float]:
    return {"MELD": meld, "IEMOCAP": iemocap}


def _model(preset: Preset, **changes: Any) -> Preset:
    return preset._replace(model=replace(preset.model, **changes))


def _loss(preset: Preset, **changes: Any) -> Preset:
    training = preset.training
    return preset._replace(training=replace(training, loss=replace(training.loss, **changes)))


def _only(preset: Preset, names: tuple[str, ...]) -> Preset:
    return _model(preset, modalities={name: preset.model.modalities[name] for name in names})


def _context(preset: Preset, context: str) -> Preset:
    modalities = {name: ModalityConfig(m.features, context) for name, m in preset.model.modalities.items()}  # type: ignore[arg-type]
    return _model(preset, modalities=modalities)


def ablation(full: Preset) -> Experiment:
    """Table IV, and the plain model without any of the three."""
    plain = _loss(full, dice_weight=0.0, corr_weight=0.0)
    cells = [
        Cell("SpikEmo", full, _paper(65.92, 71.50)),
        Cell("without DSC and corr", plain, _paper(61.53, 68.71)),
        Cell("without DSC", _loss(full, dice_weight=0.0), _paper(64.10, 69.75)),
        Cell("without corr", _loss(full, corr_weight=0.0), _paper(63.00, 69.84)),
        Cell("without DSWA", _model(full, dswa=None), _paper(62.44, 69.03)),
        Cell("without DSWA, DSC and corr", _model(plain, dswa=None), {}),
    ]
    return Experiment("Ablation (Table IV)", cells, "The last line is ours.")


def modalities(full: Preset) -> Experiment:
    """Table V: every choice of the modalities that there are."""
    names = tuple(full.model.modalities)
    subsets = [subset for count in range(len(names), 0, -1) for subset in combinations(names, count)]
    cells = [
        Cell(
            " + ".join(subset),
            _only(full, subset),
            {data: by_subset[frozenset(subset)] for data, by_subset in PAPER_WEIGHTED_F1.items()}
            if set(subset) <= {"text", "audio", "visual"}
            else {},
        )
        for subset in subsets
    ]
    return Experiment("Modalities (Table V)", cells, "One modality alone has no pair, and so no correlation loss.")


def timesteps(full: Preset) -> Experiment:
    """Figure 4: T = 2 ... 64."""
    dswa = full.model.dswa
    if dswa is None:
        raise ValueError("timesteps: the configuration has no DSWA, and so no time steps.")
    cells = [Cell(f"T = {T}", _model(full, dswa=replace(dswa, time_steps=T)), {}) for T in (2, 4, 8, 16, 32, 64)]
    return Experiment("Time steps (Figure 4)", cells, "The paper plots a rise from T = 2 to 64 and prints no numbers.")


def losses(full: Preset) -> Experiment:
    """The losses one by one, the paper's and ours."""
    corr = full.training.loss.corr_weight
    plain = _loss(full, dice_weight=0.0, corr_weight=0.0)
    cells = [
        Cell("CE + DSC + corr", full, _paper(65.92, 71.50)),
        Cell("CE, as if classes were equal", _loss(plain, balance=0.0), {}),
        Cell("CE", plain, _paper(61.53, 68.71)),
        Cell("CE + DSC", _loss(full, corr_weight=0.0), _paper(63.00, 69.84)),
        Cell("CE + corr", _loss(full, dice_weight=0.0), _paper(64.10, 69.75)),
        Cell("CE + corr + SWFC", _loss(full, **_MULTIEMO_LOSS), {}),
        Cell("CE + DSC + corr, corr as in the paper", _loss(full, corr_weight=corr / _CORR_SCALE), {}),
    ]
    note = "Cross-entropy makes up for a part of the inequality of classes (`balance`), but in the second line."
    return Experiment("Losses", cells, note)


def compare(full: Preset) -> Experiment:
    """SpikEmo beside our configurations of what came before."""
    without = _model(full, dswa=None)
    alone = _model(_context(without, "bidirectional"), fusion=FusionConfig(layers=0))
    cells = [
        Cell("SpikEmo", full, _paper(65.92, 71.50)),
        Cell("MultiEMO", _loss(without, **_MULTIEMO_LOSS), _paper(64.43, 68.33)),
        Cell("DialogueRNN", _loss(alone, dice_weight=0.0, corr_weight=0.0), _paper(58.73, 62.75)),
    ]
    note = (
        "All in our code, at one size and with one optimiser. MultiEMO: no DSWA, and the sample-weighted focal "
        "contrastive loss in the place of DSC. DialogueRNN: one in both directions for each modality, "
        "concatenated, with cross-entropy."
    )
    return Experiment("Comparison (Table II)", cells, note)


EXPERIMENTS: dict[str, Callable[[Preset], Experiment]] = {
    "ablation": ablation,
    "modalities": modalities,
    "timesteps": timesteps,
    "losses": losses,
    "compare": compare,
}
