"""Where the time of a SpikEmo training step goes, on a CPU: ``python -m benchmarks.profile``.

Prints the parts of a step at MELD's published configuration (16 dialogues of the lengths that MELD has), forward and
backward, now and before two changes: linear layers by PyTorch instead of `event_linear`, and one cell of DialogueRNN
at a time instead of all together. docs/performance.md says what follows from it.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.suites.model import DIALOGUES, MELD, PeerContext, PeerEncoders, make_batch, tiny
from spikeattn import EventLinear
from spikemo_model import DialogueBatch, SpikEmo
from spikemo_model.config import Preset
from spikemo_model.context import DialogueRNN
from spikemo_model.losses import spikemo_loss

# What a registered operation of ours belongs to, forward and backward.
OPERATIONS = {
    "linear layers": ("spikeattn::event_linear_forward", "spikeattn::event_linear_backward"),
    "norm and neurons": ("spikeattn::norm_lif_forward", "spikeattn::norm_lif_backward"),
    "spiking attention": ("spikeattn::spiking_attention_forward", "spikeattn::spiking_attention_backward"),
}


def seconds(run: Callable[[], object], rounds: int) -> float:
    """Median time of ``run`` after two warm-up calls."""
    samples = []
    for i in range(rounds + 2):
        start = time.perf_counter()
        run()
        if i >= 2:
            samples.append(time.perf_counter() - start)
    return statistics.median(samples)


def parts(model: SpikEmo, batch: DialogueBatch, preset: Preset, rounds: int) -> dict[str, float]:
    """Seconds of a whole step, and of each part of the model run alone, forward and backward."""

    def step() -> None:
        model.zero_grad()
        logits, fused = model(batch)
        by_modality = {name: x[batch.mask] for name, x in fused.items()}
        labels = batch.labels[batch.mask]
        spikemo_loss(logits[batch.mask], by_modality, labels, preset.training.loss).total.backward()

    def alone(part: Callable[[dict[str, Tensor]], dict[str, Tensor]], inputs: dict[str, Tensor]) -> float:
        def run() -> None:
            leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
            sum(x.sum() for x in part(leaves).values()).backward()

        return seconds(run, rounds)

    encoded = model.encoders(batch.features, batch.speakers, batch.mask, batch.parties)
    adapted = model._adapt(encoded, batch.mask)
    return {
        "whole step": seconds(step, rounds),
        "context (DialogueRNN)": alone(
            lambda x: model.encoders(x, batch.speakers, batch.mask, batch.parties), batch.features
        ),
        "DSWA (spiking transformer)": alone(lambda x: model._adapt(x, batch.mask), encoded),
        "fusion (MultiAttn)": alone(lambda x: model.fusion(x, batch.mask), adapted),
        **_operations(step),
    }


def _operations(step: Callable[[], None]) -> dict[str, float]:
    """Seconds of our operations within a step, by `OPERATIONS`."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    spent = {event.key: event.cpu_time_total / 1e6 for event in profiler.key_averages()}
    return {f"- {name}": sum(spent.get(key, 0.0) for key in keys) for name, keys in OPERATIONS.items()}


def before(model: SpikEmo) -> SpikEmo:
    """The same model with PyTorch's linear layers, and one cell of DialogueRNN at a time."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, EventLinear):
            module.backend = "torch"
    encoders = dict(model.encoders.items())
    for encoder in encoders.values():
        if isinstance(encoder.context, DialogueRNN):
            encoder.context = PeerContext(encoder.context)
    model.encoders = PeerEncoders(encoders)
    return model


def table(now: dict[str, float], earlier: dict[str, float]) -> str:
    """Milliseconds and shares of the step, as Markdown."""
    lines = ["| part | before, ms | now, ms | share now |", "| --- | --- | --- | --- |"]
    for name, own in now.items():
        then = f"{1e3 * earlier[name]:.0f}" if earlier[name] else "-"
        lines.append(f"| {name} | {then} | {1e3 * own:.0f} | {own / now['whole step']:.0%} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="size 1")
    parser.add_argument("--rounds", type=int, default=5, help="measured calls of each part")
    options = parser.parse_args()
    preset, lengths = (tiny if options.quick else MELD)(DIALOGUES["cpu"])
    torch.manual_seed(0)
    model, batch = SpikEmo(preset.model), make_batch(preset.model, lengths)
    rounds = 1 if options.quick else options.rounds
    print(f"{len(lengths)} dialogues, {sum(lengths)} utterances, {torch.get_num_threads()} threads\n")
    print(table(parts(model, batch, preset, rounds), parts(before(model), batch, preset, rounds)))


if __name__ == "__main__":
    main()
