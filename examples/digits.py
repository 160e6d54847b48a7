"""Spiking attention on handwritten digits: the parts of `spikeattn` in a project of your own.

What one learns: how to encode real input as a static current, repeat it over T time steps, read a class off the
spikes, and train through the surrogate gradient. The digits are scikit-learn's, 8 rows of 8 pixels; a row is a token.
Prints the loss by epoch, the firing rate of each layer and the accuracy on digits that were held out.
"""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from spikeattn import SpikingTransformer, firing_rates

T, DIM, HEADS, EPOCHS, BATCH = 4, 64, 4, 15, 64


class DigitClassifier(nn.Module):
    """Rows to tokens, one spiking transformer block, mean over time and tokens, class."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, DIM)
        self.position = nn.Parameter(torch.randn(8, DIM) * 0.5)
        self.blocks = SpikingTransformer(DIM, depth=1, num_heads=HEADS, mlp_ratio=2.0)
        self.norm = nn.LayerNorm(DIM)
        self.head = nn.Linear(8 * DIM, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, 10] of images [B, 8, 8]."""
        tokens = self.embed(images) + self.position  # [B, L, D]
        spikes = self.blocks(tokens.expand(T, *tokens.shape))  # [T, B, L, D]: the same current at every step
        return self.head(self.norm(spikes.mean(0)).flatten(1))


def main() -> float:
    """Train, and return the accuracy on the held-out digits."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    train, test = train_test_split(torch.arange(len(labels)), test_size=0.25, random_state=0, stratify=labels)

    model = DigitClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for epoch in range(EPOCHS):
        total = 0.0
        for batch in train[torch.randperm(len(train))].split(BATCH):
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        print(f"epoch {epoch + 1:2d}  loss {total / len(train):.3f}")

    with torch.no_grad():
        accuracy = (model(images[test]).argmax(-1) == labels[test]).float().mean().item()
    for layer, rate in firing_rates(model, images[test]).items():
        print(f"{layer:30s} {100 * rate:5.1f} % of the neurons fire a step")
    print(f"accuracy on {len(test)} held-out digits: {100 * accuracy:.1f} %")
    return accuracy


if __name__ == "__main__":
    assert main() > 0.95
