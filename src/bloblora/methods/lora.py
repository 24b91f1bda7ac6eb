r"""Maximum likelihood: plain LoRA (Hu et al., arXiv 2106.09685), the baseline of all others.

.. math:: \min_{A, B}\ \frac1D \sum_k -\log p(y_k \mid x_k, W_0 + s B A)

Defaults as PEFT has them; the learning rate is this project's (`docs/options.md`).
"""

from .method import Method


class Lora(Method):
    """A point, trained by AdamW without weight decay."""

    name = "lora"
    paper = "2106.09685"
    deterministic = True
    sharded = True
