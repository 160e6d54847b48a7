"""The peer in another process: its spikes, its seconds, and why it is absent.

The package is the real one where $OLD_SPIKINGJELLY names it, else a stand-in with the part that the peer uses.
"""

import os

import pytest
import torch
from spikingjelly.activation_based import neuron

from benchmarks.measure import contender, measure
from benchmarks.old_spikingjelly import NAME, VARIABLE, Model, old_contender
from benchmarks.peer_block import PeerBlock
from benchmarks.registry import Case
from benchmarks.suites.block import parts_of
from spikeattn import SpikingTransformerBlock, lif, norm_lif

LIF_NODE = """
import torch

print("no answer")


class LIFNode(torch.nn.Module):
    def __init__(self, tau, surrogate_function, detach_reset, step_mode, backend="torch", v_threshold=1.0):
        super().__init__()
        self.tau, self.v_threshold, self.v = tau, v_threshold, None

    def reset(self):
        self.v = 0.0

    def forward(self, x):
        spikes = []
        for x_t in x:
            h = self.v + (x_t - self.v) / self.tau
            fires = h >= self.v_threshold
            spikes.append(fires.to(x) + 0 * h)
            self.v = h * ~fires
        return torch.stack(spikes)
"""


FUNCTIONAL = """
def reset_net(net):
    for module in net.modules():
        if hasattr(module, "reset"):
            module.reset()


def set_backend(net, backend):
    pass
"""


def write_package(folder, lif_node=LIF_NODE, version="0.0.0.0.14"):
    """A package named spikingjelly in ``folder``."""
    files = {
        "spikingjelly/__init__.py": "",
        "spikingjelly/activation_based/__init__.py": "",
        "spikingjelly/activation_based/surrogate.py": "class ATan:\n    pass\n",
        "spikingjelly/activation_based/neuron.py": lif_node,
        "spikingjelly/activation_based/functional.py": FUNCTIONAL,
        "spikingjelly-0.dist-info/METADATA": f"Metadata-Version: 2.1\nName: spikingjelly\nVersion: {version}\n",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The real one or the stand-in."""
    if not os.environ.get(VARIABLE):
        write_package(tmp_path)
        monkeypatch.setenv(VARIABLE, str(tmp_path))


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_spikes_are_those_of_the_new_one(dtype):
    x = torch.randn(8, 50).mul_(2).to(dtype)
    node = Model(x, tau=2.0)
    spikes = node.ask("spikes")
    assert 0.05 < spikes.float().mean() < 0.5
    assert torch.equal(spikes, neuron.LIFNode(2.0, step_mode="m")(x))
    assert torch.equal(spikes, node.ask("spikes"))  # it is reset before each run
    if dtype == torch.float32:
        assert torch.equal(spikes, lif(x, tau=2.0).spikes)


@pytest.mark.usefixtures("package")
def test_its_spikes_after_a_norm_are_ours():
    x, weight, bias = torch.randn(4, 3, 16), torch.full((16,), 2.0), torch.linspace(-0.5, 0.5, 16)
    spikes = Model(x, 2.0, (weight, bias)).ask("spikes")
    assert spikes.any()
    assert torch.equal(spikes, norm_lif(x, weight, bias, tau=2.0).spikes)


@pytest.mark.usefixtures("package")
def test_its_block_is_that_of_the_new_one():
    x, parts = torch.randn(4, 2, 5, 32), parts_of(SpikingTransformerBlock(32, 2, tau=2.0), 5)
    torch.testing.assert_close(Model(x, block=parts).ask("spikes"), PeerBlock(parts)(x))


@pytest.mark.usefixtures("package")
def test_it_is_measured_beside_ours_by_its_own_seconds():
    x = torch.randn(4, 10)
    own = contender("ours", torch.sigmoid, x)
    row = measure(Case("c", {}, own, {NAME: lambda: old_contender(NAME, x, tau=2.0)}), "cpu", 0.0)
    for kind in ("forward", "training"):
        assert row[kind][NAME]["first_s"] > 0
        assert len(row[kind][NAME]["samples_s"]) == 3
        assert all(0 < seconds < 10 for seconds in row[kind][NAME]["samples_s"])
        assert NAME not in row["peak_bytes"][kind]
    assert NAME not in row["kept_bytes"]
    assert row["absent"] == {}


def test_the_process_ends_with_its_model(tmp_path, monkeypatch):
    write_package(tmp_path)
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    node = Model(torch.randn(2, 3), 2.0)
    process = node._process
    assert process.poll() is None
    del node
    assert process.returncode == 0


def absence(x):
    """Why it is absent."""
    case = Case("c", {}, contender("ours", torch.sigmoid, x), {NAME: lambda: old_contender(NAME, x, tau=2.0)})
    return measure(case, "cpu", 0.0)["absent"][NAME]


def test_without_its_folder_it_is_absent_with_the_command_that_makes_one(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert "`pip install --no-deps --target FOLDER spikingjelly==0.0.0.0.14`" in absence(torch.randn(2, 3))


@pytest.mark.parametrize(
    ("lif_node", "version", "reason"),
    [
        (LIF_NODE, "0.0.0.0.12", "ImportError: OLD_SPIKINGJELLY holds spikingjelly 0.0.0.0.12"),
        ("import nothing_of_this_name", "0.0.0.0.14", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("import os; os._exit(3)", "0.0.0.0.14", "its process ended with status 3"),
    ],
)
def test_one_that_cannot_run_is_absent_with_its_reason(lif_node, version, reason, tmp_path, monkeypatch):
    write_package(tmp_path, lif_node, version)
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert absence(torch.randn(2, 3)) == reason
