"""SpikEmo on a device: the kernels inside it, CUDA graphs, and a run of training."""

import pytest
import torch
from model_helpers import random_batch, small_config

from spikemo_model import SpikEmo
from spikemo_model.config import DSWAConfig, ModalityConfig, Preset, SpikEmoConfig, compact
from spikemo_model.context import DialogueCell, advance
from spikemo_model.data import synthetic_corpus
from spikemo_model.graphs import GraphedSpikEmo, rounded
from spikemo_model.model import SpikEmoOutput
from spikemo_model.training import train

pytestmark = pytest.mark.cuda


def run(model, call, batch):
    """Logits of ``call``, and the gradients of a weighted sum of them."""
    model.zero_grad()
    logits = call(batch).logits
    (logits * torch.linspace(-1, 1, logits.numel(), device=logits.device).view_as(logits)).sum().backward()
    return logits.detach().clone(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_a_device_gives_what_the_definition_gives_in_float64():
    model, batch = SpikEmo(small_config()).double().eval(), random_batch((5, 9, 2))
    wanted = model(batch).logits
    got = model.cuda()(batch.to("cuda")).logits
    torch.testing.assert_close(got.cpu(), wanted)


@pytest.mark.parametrize(("low", "tolerance"), [(False, 1e-4), (True, 0.05)])
def test_recurrences_on_a_device_are_those_of_a_cpu(low, tolerance):
    cells = torch.nn.ModuleList(DialogueCell(64) for _ in range(3))
    u, speakers = torch.randn(3, 5, 9, 64), torch.randint(0, 3, (3, 5, 9))
    mask = (torch.arange(9) < torch.tensor([9, 7, 1, 4, 9])[:, None]).expand(3, 5, 9)
    results = []
    for device in ("cpu", "cuda"):
        cells.to(device).zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=low and device == "cuda"):
            states, _ = advance(list(cells), u.to(device), speakers.to(device), mask.to(device))
        states.square().sum().backward()
        results.append([states.detach().cpu(), *(p.grad.cpu().clone() for p in cells.parameters())])
    for wanted, got in zip(*results, strict=True):
        assert (got - wanted).norm() < tolerance * wanted.norm()


def test_graphs_replay_the_model_and_its_gradients():
    config = small_config(dropout=0.0, dswa=DSWAConfig(time_steps=8, depth=2, num_heads=2))
    model = SpikEmo(config).cuda().train()
    graphed = GraphedSpikEmo(model)
    for lengths in ((3, 5), (8, 7), (12, 2), (6, 6)):  # only the first and the third are of a new shape
        batch = random_batch(lengths, dtype=torch.float32).to("cuda")
        whole, L = rounded(batch), max(lengths)
        logits, grads = run(model, graphed, batch)
        wanted, wanted_grads = run(
            model, lambda _, whole=whole, L=L: SpikEmoOutput(model(whole).logits[:, :L], {}), batch
        )
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)
        assert grads.keys() == wanted_grads.keys()
        for name, grad in wanted_grads.items():
            torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-4)
    assert graphed._usable
    assert len(graphed._graphs) == 2


def test_dropout_differs_from_replay_to_replay():
    model = SpikEmo(small_config(dropout=0.5)).cuda().train()
    graphed, batch = GraphedSpikEmo(model), random_batch((4, 4), dtype=torch.float32).to("cuda")
    first = graphed(batch).logits.detach().clone()
    assert not torch.equal(graphed(batch).logits, first)
    assert graphed._usable


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_run_on_a_device_learns_and_evaluates(tmp_path, precision, caplog):
    corpus = synthetic_corpus(40)
    model, config = compact(corpus.widths, corpus.classes)
    contexts = {name: ModalityConfig(m.features, "bidirectional") for name, m in model.modalities.items()}
    model = SpikEmoConfig(contexts, corpus.classes, dim=32, dswa=model.dswa, fusion=model.fusion)
    options = {"epochs": 4, "batch_size": 8, "precision": precision, "gradient_clip": 1.0}
    result = train(corpus, Preset(model, config.__class__(**options)), tmp_path, accelerator="gpu", progress=False)
    losses = [row["train_total"] for row in result.history]
    assert losses[-1] < losses[0]
    assert not [record for record in caplog.records if "CUDA graphs" in record.getMessage()]
