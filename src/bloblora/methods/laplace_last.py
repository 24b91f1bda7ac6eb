r"""Laplace over the last layer alone (Daxberger et al., arXiv 2106.14806; "LLLA" in Yang et al., arXiv 2308.13111).

.. math:: W_s \sim \mathcal N\big(W^*, (G_W \otimes A_W + \delta I)^{-1}\big), \quad
    f_s(x) = f(x) + J_W(x)(W_s - W^*)

W is the last layer: a classification head's linear layer (its bias is left out) where there is a head, and otherwise
the LoRA of the last block that has one. Factors and δ as in `bloblora.methods.laplace`; other weights keep
their values.
"""

import re

from torch import nn

from .laplace import Laplace, trained_layers


class LaplaceLast(Laplace):
    """A Gaussian over the last layer's weights."""

    name = "laplace-last"
    paper = "2106.14806"

    def layers(self, model: nn.Module) -> dict[str, nn.Linear]:
        """The head's linear layer, or A and B of the last block."""
        trained = trained_layers(model)
        last = list(trained)[-1]
        if ".lora_" not in last:
            return {last: trained[last]}
        block = re.match(r".*\.\d+\.", last)
        start = block[0] if block else last.partition(".lora_")[0]
        return {name: layer for name, layer in trained.items() if name.startswith(start)}
