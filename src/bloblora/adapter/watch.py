"""Notices when a posterior is trained without its KL, as a Trainer that knows nothing of it does."""

import warnings

from torch import Tensor, nn

_STEPS = 3  # one or two may be of someone who tries out a forward and a step


class KlWatch:
    """Counts the optimizer steps on one adapter's Ω since something last read Ω, which computing a KL does.

    A loop of your own that calls `Posterior.kl`, or computes a KL from ``named_stds``, is never warned about.

    Attributes:
        silent: whether nothing is counted any more: a KL was seen, or is known of, or the warning was given.
    """

    def __init__(self) -> None:
        self.silent = False
        self._steps = self._looks = 0
        self._sum: float | None = None  # torch's version of a tensor isn't told of a fused optimizer's steps

    def looked(self) -> None:
        """Ω was looked at."""
        self._looks += self._sum is not None
        self._steps, self._sum = 0, None
        self.silent |= self._looks >= _STEPS

    def trained(self, std_parameter: Tensor) -> None:
        """A forward in train mode used this parameter of Ω."""
        # A tensor of torch.func's, a part of one, or one without values can't be looked at.
        if self.silent or type(std_parameter) is not nn.Parameter or std_parameter.is_meta:
            return
        before, self._sum = self._sum, std_parameter.detach().double().sum().item()
        self._steps += before not in (None, self._sum)
        if self._steps >= _STEPS:
            self.silent = True
            warnings.warn(
                f"the posterior was trained for {_STEPS} steps without its KL, so that nothing keeps its Ω from "
                "vanishing: use BlobTrainer instead of Trainer, class MyTrainer(BlobTrainerMixin, SFTTrainer) instead "
                "of another Trainer, and in a loop of your own add posterior.kl() / number of examples to the loss",
                stacklevel=2,
            )
