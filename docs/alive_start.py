"""Print the tables of docs/alive-start.md: python docs/alive_start.py"""

import torch

from spikeattn import LIF, SpikingTransformer, firing_rates
from spikeattn.nn.alive import norm_gain

N = 200_000


def rate(currents: torch.Tensor, tau: float) -> float:
    """Spikes a neuron and time step."""
    return LIF(tau)(currents).mean().item()


def main() -> None:
    """Rates of single layers under the two kinds of current, then of whole blocks from the two starts."""
    torch.manual_seed(0)
    print("| tau | T | constant currents, g = 1 | noise, g = 1 | constant currents, our g | noise, our g |")
    print("| --- | --- | --- | --- | --- | --- |")
    for tau in (2.0, 10.0):
        for T in (4, 32):
            cells = []
            for gain in (1.0, norm_gain(tau)):
                cells += [rate((torch.randn(N) * gain).expand(T, N), tau), rate(torch.randn(T, N) * gain, tau)]
            print(f"| {tau:g} | {T} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")

    x = torch.randn(4, 24, 256)
    rates = [
        firing_rates(SpikingTransformer(256, 2, 8, tau=10.0, init=init), x.expand(32, 4, 24, 256))
        for init in ("alive", "published")
    ]
    print("\n| layer | block 0, alive | block 1, alive | block 0, published | block 1, published |")
    print("| --- | --- | --- | --- | --- |")
    for layer in (
        "attn.q.lif",
        "attn.k.lif",
        "attn.v.lif",
        "attn.attn_lif",
        "attn.out.lif",
        "mlp.fc1.lif",
        "mlp.fc2.lif",
    ):
        cells = [100 * own[f"blocks.{block}.{layer}"] for own in rates for block in (0, 1)]
        print(f"| {layer} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")


if __name__ == "__main__":
    main()
