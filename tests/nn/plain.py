"""Slow plain definitions that the tests of the attention modules share: loops over single neurons, in float64."""

import torch


def fire(current, tau=2.0, threshold=1.0):
    """Spikes of LIF neurons with a hard reset to 0, one time step after another."""
    v, spikes = torch.zeros_like(current[0]), []
    for x in current:
        h = v + (x - v) / tau
        spikes.append((h >= threshold).to(x.dtype))
        v = h * (1 - spikes[-1])
    return torch.stack(spikes)


def layer(part, x, mask=None):
    """``LIF(norm(Linear(x)))`` of a `SpikingLinear` with LayerNorm; silent at padding."""
    current = part.norm(part.linear(x))
    if mask is not None:
        current = current.masked_fill(mask[None, :, :, None], 0.0)
    return fire(current, part.lif.tau, part.lif.v_threshold)


def heads(x, H):
    """[T, B, H, L, E] of [T, B, L, D], one head after another."""
    E = x.shape[-1] // H
    return torch.stack([x[..., h * E : (h + 1) * E] for h in range(H)], dim=2)


def merged(x):
    """[T, B, L, D] of [T, B, H, L, E]."""
    return torch.cat([x[:, :, h] for h in range(x.shape[2])], dim=-1)


def started(module):
    """``module`` with random parameters at which about half of its neurons fire, so that counts are large."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name.endswith("linear.weight"):
                p.normal_(std=2 * p.shape[1] ** -0.5)
            else:
                p.uniform_(1.0, 2.0) if name.endswith("norm.weight") else p.uniform_(0.5, 2.0)
    return module
