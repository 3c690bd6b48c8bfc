"""Settings of published methods for ptq.reconstruct, with their papers' numbers.

Each goes with a quantizer, and with what counts as a block. To shorten one: dataclasses.replace(ADAROUND, steps=1000),
and raise the rate of a group whose rate does not follow from the steps.
"""

import dataclasses

from flax import nnx
import optax

from qat.ptq.reconstruct import Group, Settings, cosine, linear
from qat.quantizers import base


def one_over(steps):
  """SignRound's rate: with the linear decay, V can go 0.5 in all, from its start to either bound."""
  return 1 / steps


def half_cosine_to_a_twentieth(progress):
  return 0.05 + 0.95 * cosine(progress)


def clipped_adam(rate):
  """Adam after clipping the norm of the group's gradient to 0.3."""
  return optax.chain(optax.clip_by_global_norm(0.3), optax.adam(rate))


def adam_without_decay(rate):
  return optax.adamw(rate, weight_decay=0.0)


# AdaRound on layers, each with its activation function. Nagel et al. 2020, Sec. 5: 10,000 steps, batches of 32 of 1,024
# images. The rate is that of the authors' toolkit.
ADAROUND = Settings((Group(base.Rounding, 1e-3),), steps=10_000, batch_size=32)

# AdaRound on residual blocks, with the importance of ptq/fisher.py. Li et al. 2021, https://arxiv.org/abs/2102.05426:
# 20,000 steps, batches of 32 of 1,024 images.
BRECQ = dataclasses.replace(ADAROUND, steps=20_000)
# Its second phase, for the learned steps of the inputs: 5,000 steps at 4e-4.
BRECQ_INPUTS = Settings((Group(base.StepSize, 4e-4),), steps=5_000, batch_size=32)

# AdaRound for the weights and QDrop(LSQ) for the inputs, together. Wei et al. 2022, https://arxiv.org/abs/2203.05740.
QDROP = Settings((Group(base.Rounding, 1e-3), Group(base.StepSize, 4e-5, decay=cosine)), steps=20_000, batch_size=32)

def hardening(progress):
  """The share of the roundings that is fixed: the last ones, which are the hardest, one by one."""
  return 1 - (1 - progress) ** 3


# AdaRound(spec, regularization=0): no regularizer drives h to 0 and 1, but the roundings nearest to these are fixed,
# more after each of 20 rounds of 250 steps. Li and Panda 2024, https://arxiv.org/abs/2410.19103. The paper's shares are
# handcrafted as well, but others; its steps are learned too.
TESSERAQ = Settings((Group(base.Rounding, 1e-3),), steps=20 * 250, batch_size=4, checks=20, hardened=hardening)

# FlexRound. Lee et al. 2023, https://arxiv.org/abs/2306.00317: 5,000 steps at 3e-3, batches of 1 of 512 texts.
FLEXROUND = Settings((Group(base.Rounding, 3e-3), Group(base.StepSize, 3e-3)), steps=5_000, batch_size=1)

# SignRound. Cheng et al. 2023, https://arxiv.org/abs/2309.05516: 200 steps of the gradient's sign, batches of 8 texts.
AUTOROUND = Settings((Group(base.Rounding, one_over, optax.sign_sgd, linear),
                      Group(base.StepSize, one_over, optax.sign_sgd, linear)), steps=200, batch_size=8)

# LWC. Shao et al. 2023, https://arxiv.org/abs/2308.13137: 20 epochs (40 for 2 bits) of 128 texts, one a step, at 1e-2.
OMNIQUANT_LWC = Settings((Group(base.StepSize, 1e-2, adam_without_decay),), steps=20 * 128, batch_size=1)

# LearnedGrid, and the weights themselves. Chen et al. 2024, https://arxiv.org/abs/2407.11062: 2 epochs of 4,096 texts,
# two a step; steps and zeros at 1e-4, weights at 1e-5 (2e-5 for 2 bits).
EFFICIENTQAT_BLOCK_AP = Settings(
    (Group(base.StepSize, 1e-4, clipped_adam, half_cosine_to_a_twentieth),
     Group(nnx.Param, 1e-5, clipped_adam, half_cosine_to_a_twentieth)), steps=2 * 4096 // 2, batch_size=2)
