"""One step of mask learning on one linear layer, from top to bottom: python examples/one_step.py

A frozen weight W gets a 2:4 mask M, one mask logit per weight. The logits are learned by gradient
descent on a loss of the masked layer; W itself never changes. ``megamask learn`` takes the same
step for every linear of a language model, with the language-modelling loss.

Shapes: O out_features, I in_features, G groups per row (I / 4), M group size (4).
"""

import torch
import torch.nn.functional as F

from megamask.sparsity.backends import choose_backend
from megamask.sparsity.distributions import DISTRIBUTIONS
from megamask.sparsity.draw import GradientSink, Sample, Site
from megamask.sparsity.noise import NoiseKey
from megamask.sparsity.operator import sample_mask, sampler_for
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.shard import Placement

ROWS, COLUMNS, TOKENS = 64, 128, 256
KAPPA, TAU = 100.0, 4.0  # scale of the logits and temperature: both sharpen as learning goes on
STRENGTH, STD = 3.0, 0.01  # how strongly the prior mask pulls, and the size of the logits
NORM_COEF = 1e-5  # reward for keeping large weights

torch.manual_seed(0)

# 1. A frozen layer, its inputs, and the outputs that the masked layer shall keep.
layer = torch.nn.Linear(COLUMNS, ROWS, bias=False).requires_grad_(False)
inputs = torch.randn(TOKENS, COLUMNS) * torch.linspace(0.1, 2.0, COLUMNS)
targets = layer(inputs)

# 2. The pattern, the place of the layer (whole, not a shard), and the distribution of its masks.
pattern = Pattern.parse("2:4")
distribution = DISTRIBUTIONS["subset"]
site = Site(pattern, Placement.whole(ROWS, pattern.groups(COLUMNS)), distribution)

# 3. A one-shot mask as the prior: the largest weights. The logits, (O, M, G), start from it.
prior = pattern.best(layer.weight.abs())
mask_logits = distribution.prior_bonus(prior, pattern, STRENGTH, STD).clone().requires_grad_()

# 4. The mask is drawn by keyed noise: the same key draws the same mask again, on any machine.
sample = Sample(NoiseKey(seed=1, step=0), KAPPA, TAU)
backend = choose_backend("auto", mask_logits.device, distribution)
sampler = sampler_for(backend, distribution)
sink = GradientSink(NORM_COEF)  # adds the gradient of the weight-norm term in the backward pass


def loss_of(logits: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The task loss, which autograd follows, and the whole loss: less the weight-norm term."""
    masked, sums, _ = sample_mask(logits, layer.weight, site, sample, sampler, sink)
    task = F.mse_loss(F.linear(inputs, masked), targets)
    return task, float(task.detach()) - NORM_COEF * float(sums[0])


# 5. Forward, backward, update. Only the logits have a gradient.
optimizer = torch.optim.AdamW([mask_logits], lr=1e-3)
task, before = loss_of(mask_logits)
task.backward()
optimizer.step()
_, after = loss_of(mask_logits)

# 6. The hard mask keeps the most probable set of every group: exactly 2 of 4, always.
mask = distribution.hard_mask(mask_logits.detach(), pattern)
kept = mask.unflatten(1, (-1, pattern.m)).sum(-1)
moved = (mask != prior).unflatten(1, (-1, pattern.m)).any(-1)

print(f"sampled by {backend} under {distribution.name} masks")
print(f"loss: {before:.6f} -> {after:.6f}")
print(f"gradient: logits {tuple(mask_logits.shape)}, weight {layer.weight.grad}")
print(f"kept in a group: {int(kept.min())} to {int(kept.max())} of {pattern.m}")
print(f"groups that left the prior: {int(moved.sum())} of {moved.numel()}")
