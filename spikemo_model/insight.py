"""What is measured on a trained model for its report: its errors, DSWA's gate, its spikes, and what they cost."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple, cast

import torch
from spikingjelly.activation_based import op_counter
from spikingjelly.activation_based.monitor import InputMonitor, OutputMonitor
from spikingjelly.activation_based.neuron import BaseNode
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from spikeattn import Spike
from spikeattn.interop.spikingjelly import add_rules
from spikemo_model.batch import DialogueBatch
from spikemo_model.data.corpus import Conversation, Corpus, collate
from spikemo_model.dswa import DynamicSpikingWeightAdaptation
from spikemo_model.evaluation import predict, score
from spikemo_model.model import SpikEmo

_SHOWN_LENGTH = 10  # utterances: enough for a gate to differ, few enough to read and to count
_ERROR_LENGTH = 3  # utterances: in shorter dialogues one odd label is the whole error


class Line(NamedTuple):
    """An utterance and what the model made of it.

    Args:
        speaker: Name.
        text: Transcript; empty if there is none.
        label: True emotion; empty if unknown.
        predicted: The likeliest emotion.
        probability: Of ``predicted``.
        label_probability: Of ``label``; None if that is unknown.
    """

    speaker: str
    text: str
    label: str
    predicted: str
    probability: float
    label_probability: float | None


@dataclass(frozen=True)
class Judged:
    """A dialogue and what the model made of it.

    Args:
        id: Its name.
        error: Mean of -log(probability of the true emotion) over its labelled utterances, in nats; nan without any.
        lines: One an utterance.
    """

    id: str
    error: float
    lines: list[Line]


class Cost(NamedTuple):
    """What one pass costs by SpikingJelly's counters.

    Args:
        mac: Multiply-accumulates.
        ac: Additions.
        synop: Those of the additions that a spike makes at a weight.
        memory_bytes: Reads of weights and biases, each time one is used, and reads and writes of potentials.
        compute_pj: Energy of ``mac`` and ``ac``, in pJ.
        memory_pj: Energy of ``memory_bytes``, in pJ.
    """

    mac: int
    ac: int
    synop: int
    memory_bytes: int
    compute_pj: float
    memory_pj: float


class Costs(NamedTuple):
    """DSWA with its neurons and with ReLU, the rest of the model, which is the same in both, and the prices."""

    spiking: Cost
    relu: Cost
    rest: Cost
    prices: op_counter.SimpleEnergyCostConfig


@dataclass(frozen=True)
class Insight:
    """What is measured on a trained model.

    Args:
        errors: Test dialogues with the largest errors, the largest first.
        shown: The test dialogue that gates, rasters and costs are of.
        gates: By modality, [L] (`gates`); empty without DSWA.
        rasters: By layer and modality, spikes [T, L, N]; empty without DSWA.
        costs: None without DSWA.
        subsets: Weighted F1 on test in percent by modalities that the model is given; empty if it needs all.
    """

    errors: list[Judged]
    shown: Judged
    gates: dict[str, Tensor]
    rasters: dict[str, dict[str, Tensor]]
    costs: Costs | None
    subsets: dict[tuple[str, ...], float]


def measure(model: SpikEmo, corpus: Corpus) -> Insight:
    """Measure ``model`` on the test split of ``corpus``; it is in eval mode afterwards.

    Args:
        model: A trained model, on any device.
        corpus: Data with its modalities and classes.
    """
    test = corpus.splits["test"]
    judged = [judge(dialogue, rows, corpus.classes) for dialogue, rows in zip(test, predict(model, test), strict=True)]
    shown = min(range(len(test)), key=lambda i: abs(len(test[i]) - _SHOWN_LENGTH))
    batch = collate([test[shown]]).to(next(model.parameters()).device)
    return Insight(
        errors=largest_errors(judged),
        shown=judged[shown],
        gates=gates(model, batch),
        rasters=rasters(model, batch),
        costs=costs(model, batch) if model.dswa else None,
        subsets=subset_scores(model, corpus) if model.config.modality_dropout else {},
    )


def judge(dialogue: Conversation, probabilities: Tensor, classes: Sequence[str]) -> Judged:
    """Set the probabilities [L, C] of a dialogue beside its labels."""
    lines, errors = [], []
    for i, row in enumerate(probabilities):
        label, likeliest = int(dialogue.labels[i]), int(row.argmax())
        known = label >= 0
        if known:
            errors.append(-row[label].clamp_min(torch.finfo(row.dtype).tiny).log())
        lines.append(
            Line(
                speaker=dialogue.speakers[i],
                text=dialogue.texts[i] if dialogue.texts else "",
                label=classes[label] if known else "",
                predicted=classes[likeliest],
                probability=float(row[likeliest]),
                label_probability=float(row[label]) if known else None,
            )
        )
    return Judged(dialogue.id, float(torch.stack(errors).mean()) if errors else float("nan"), lines)


def largest_errors(judged: Sequence[Judged], count: int = 5) -> list[Judged]:
    """The ``count`` dialogues with the largest errors, of those with three utterances or more, if there are any."""
    labelled = [dialogue for dialogue in judged if dialogue.error == dialogue.error]
    longer = [dialogue for dialogue in labelled if len(dialogue.lines) >= _ERROR_LENGTH]
    return sorted(longer or labelled, key=lambda dialogue: -dialogue.error)[:count]


def gates(model: SpikEmo, batch: DialogueBatch) -> dict[str, Tensor]:
    """How DSWA weighs the utterances of a dialogue against each other, 1 where all count alike.

    The softmax of eq. (2), times the number of utterances that it runs over, as the mean over the features that are
    not 0, which nothing can weigh: ``n * mean(F after / F before - 1)``.

    Args:
        model: In eval mode.
        batch: One dialogue of L utterances.

    Returns:
        By modality, [L]; nan where all features are 0. Empty without DSWA.
    """
    if not model.dswa:
        return {}
    kind = DynamicSpikingWeightAdaptation
    inputs, outputs = InputMonitor(model, kind, lambda args: args[0]), OutputMonitor(model, kind)
    with inputs, outputs, torch.no_grad():
        model(batch)
    gate = torch.cat(outputs.records) / torch.cat(inputs.records) - 1  # [M, L, D], nan where a feature is 0
    L = batch.mask.shape[1]
    over = torch.arange(1, L + 1, device=gate.device) if model.config.is_causal else L
    return dict(zip(model.encoders, (over * gate.nanmean(-1)).cpu(), strict=True))


def rasters(model: SpikEmo, batch: DialogueBatch) -> dict[str, dict[str, Tensor]]:
    """The spikes of each spiking layer.

    Args:
        model: In eval mode.
        batch: One dialogue of L utterances.

    Returns:
        By layer, by modality, [T, L, N], N the layer's neurons of an utterance (head by head, L keys each, where the
        map fires).
    """
    names, spikes = list(model.encoders), OutputMonitor(model.dswa, (BaseNode, Spike))
    with spikes, torch.no_grad():
        model(batch)
    found: dict[str, dict[str, Tensor]] = {}
    for name in spikes.monitored_layers:
        owner, layer = name.split(".", 1)
        fired = [_by_utterance(record, cast(int, model.dswa[owner].time_steps)) for record in spikes[name]]
        owners = names if owner == "shared" else [owner]
        by_modality = torch.cat(fired, dim=1).cpu().unbind(1)
        found.setdefault(layer, {}).update(zip(owners, by_modality, strict=True))
    return found


def _by_utterance(spikes: Tensor, time_steps: int) -> Tensor:
    """Spikes [T, B, L, N] of a layer that gives these, a map [T, B, H, L, S], or one step [B, L, N] for all."""
    if spikes.ndim == 3:
        return spikes.expand(time_steps, *spikes.shape)
    return spikes if spikes.ndim == 4 else spikes.transpose(2, 3).flatten(3)


class _ReLU(nn.ReLU):
    """ReLU with the call of `spikeattn.LIF`: after a norm, and silent at padding, if they are given."""

    def forward(self, x: Tensor, norm: nn.Module | None = None, padding_mask: Tensor | None = None) -> Tensor:
        """``x`` where it is above 0, else 0."""
        x = x if norm is None else norm(x)
        return super().forward(x if padding_mask is None else x.masked_fill(padding_mask.unsqueeze(-1), 0.0))


def with_relu(model: SpikEmo) -> SpikEmo:
    """A copy of ``model`` with ReLU in the place of each neuron, and one time step: more would be the same again."""
    model = copy.deepcopy(model)
    for dswa in model.dswa.values():
        cast(DynamicSpikingWeightAdaptation, dswa).time_steps = 1
        for module in list(dswa.modules()):
            for name, child in module.named_children():
                if isinstance(child, BaseNode | Spike):
                    setattr(module, name, _ReLU())
    return model


def costs(model: SpikEmo, batch: DialogueBatch) -> Costs:
    """Count what DSWA costs with its neurons and with ReLU (`with_relu`), in one pass on ``batch`` each.

    By spikingjelly's ``SimpleEnergyProfiler`` with our rules and its prices (45 nm, 32-bit floats). A product is an
    addition where one factor is a spike, so 0 or 1, and costs nothing where that is 0. Divisions, LayerNorm, softmax,
    exponentials and what GRUs do between their products are not counted; memory is counted in DSWA alone, where every
    weight belongs to a Linear.

    Args:
        model: In eval mode, with DSWA.
        batch: A few utterances: counting is as slow as spikingjelly's neurons are.
    """
    prices = op_counter.SimpleEnergyCostConfig()
    spiking, whole = _count(model, batch)
    relu, _ = _count(with_relu(model), batch)
    rest = [*(total - own for total, own in zip(whole[:3], spiking[:3], strict=True)), 0]
    return Costs(_priced(spiking, prices), _priced(relu, prices), _priced(rest, prices), prices)


def _priced(counts: list[int], prices: op_counter.SimpleEnergyCostConfig) -> Cost:
    """Multiply-accumulates, additions, synaptic operations and bytes with their energy."""
    mac, ac, synop, memory = counts
    compute_pj = mac * prices.e_mac_pj + ac * prices.e_ac_pj
    return Cost(mac, ac, synop, memory, compute_pj, memory * prices.e_memory_pj_per_byte)


def _count(model: SpikEmo, batch: DialogueBatch) -> tuple[list[int], list[int]]:
    """Multiply-accumulates, additions, synaptic operations and bytes of DSWA, and of the whole model."""
    profiler = add_rules(op_counter.SimpleEnergyProfiler())
    profiler.bind_model(model)
    # With gradients and by plain products, attention runs as operations that the counters know.
    with profiler, torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        model(batch)
    counters = (profiler.mac_counter, profiler.ac_counter, profiler.synop_counter, profiler.memory_counter)
    scopes = [f"{type(model).__name__}.dswa.{owner}" for owner in model.dswa]
    own = [sum(sum(counter.get_counts()[scope].values()) for scope in scopes) for counter in counters]
    return own, [counter.get_total() for counter in counters]


def subset_scores(model: SpikEmo, corpus: Corpus) -> dict[tuple[str, ...], float]:
    """Weighted F1 on test, in percent, of ``model`` given each non-empty subset of its modalities, all of them last."""
    names = list(model.encoders)
    subsets = [subset for size in range(1, len(names) + 1) for subset in combinations(names, size)]
    scores = {}
    for subset in subsets:
        test = corpus.select(subset).splits["test"]
        scores[subset] = score(predict(model, test), test, corpus.classes).weighted_f1
    return scores
