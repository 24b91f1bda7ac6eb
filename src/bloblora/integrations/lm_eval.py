r"""Runs in EleutherAI's lm-evaluation-harness, as its model ``bloblora``.

The harness finds models that aren't its own by their import alone, so this module is its command line too::

    python -m bloblora.integrations.lm_eval --model bloblora --model_args run=runs/arc,samples=10 --tasks arc_easy

In Python, import this module and call ``lm_eval.simple_evaluate(model="bloblora", …)``, or pass it a `BlobLM`.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import StoppingCriteriaList, StopStringCriteria

from ..generation import posterior_generate
from ..runs import PredictionOptions, RunError, load_run, open_run

_OPTIONS = (
    *("batch_size", "max_batch_size", "max_length", "truncation", "logits_cache", "add_bos_token", "prefix_token_id"),
    *("softmax_dtype", "mixed_precision_dtype", "think_end_token", "enable_thinking", "chat_template_args"),
)


@register_model("bloblora")
class BlobLM(HFLM):
    r"""A run's language model, averaged over draws of its weights.

    The log-likelihood of a continuation is that of the posterior predictive,

    .. math:: \log \bar p(y \mid x) = \log \frac1S \sum_s \prod_t p_s(y_t \mid y_{<t}, x),

    so each draw answers for the whole continuation. (A product of averaged tokens would draw the weights anew for every
    token.) A continuation counts as greedy where more than half of the draws write it greedily. Generation takes each
    token by the draws' mean, see `bloblora.posterior_generate`.

    Args:
        run: what `bloblora.runs.load_run` takes; of a task without a classification head.
        samples: weight draws N; 0 is the posterior mean, which is what ``hf`` with ``peft`` gives.
        seed: of the draws.
        device: where to put the model; without CUDA, which the command line asks for unless told otherwise, the CPU.
        trust_remote_code: as of `load_run`.
        **options: of ``HFLM``, those that aren't about loading: ``batch_size``, ``max_length``, ``add_bos_token``, …

    Raises:
        RunError: the run isn't one, has a head, or draws no weights (temperature, Laplace); or an option is unknown or
            out of range. All is known before the model is loaded.
    """

    def __init__(
        self,
        run: str,
        samples: int = 10,
        seed: int = 0,
        device: str | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> None:
        PredictionOptions(samples=samples, seed=seed)
        if unknown := sorted(options.keys() - set(_OPTIONS)):
            known = ", ".join(("run", "samples", "seed", "device", "trust_remote_code", *_OPTIONS))
            raise RunError(f"model_args: there is no {', '.join(unknown)}; there are {known}")
        description = open_run(run)
        if (task := description.task).head is not None:
            raise RunError(f"{run}: the run's task is {task.name}, whose head scores no text; use `bloblora evaluate`")
        if not description.method.writes_text:
            raise RunError(f"{run}: temperature scaling and Laplace draw no weights; take a run of another method")
        device = device or "cuda"
        usable = "cpu" if device.startswith("cuda") and not torch.cuda.is_available() else device
        loaded = load_run(description, trust_remote_code=trust_remote_code)
        super().__init__(pretrained=loaded.model.to(usable), tokenizer=loaded.tokenizer, **options)
        self._sampler, self._samples, self._seed = loaded.sampler, samples, seed

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Store no parts: what one draw says isn't the answer. Whole answers are cached all the same."""

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, nats, and whether it is greedy."""
        draws = self._draws(lambda: HFLM.loglikelihood(self, requests, disable_tqdm))
        greedy = draws[..., 1].mean(0) > 0.5
        return [*zip(_log_mean(draws[..., 0]).tolist(), greedy.tolist(), strict=True)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text, nats; its windows see the same draw."""
        return _log_mean(self._draws(lambda: HFLM.loglikelihood_rolling(self, requests, disable_tqdm))).tolist()

    def _draws(self, scores: Callable[[], list[Any]]) -> Tensor:
        """What one model says, of each draw, (S, n, …)."""
        forward = lambda: torch.tensor(scores(), dtype=torch.float64)  # noqa: E731
        return torch.stack([*self._sampler.logits(forward, self._samples, self._seed)])

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        """Prompts and answers, (b, T)."""
        if not self._samples:
            return super()._model_generate(context, max_length, stop, **options)
        if not options.get("do_sample"):
            options.pop("temperature", None)
        pad = self.tokenizer.pad_token_id
        inputs = {"input_ids": context, "attention_mask": options.pop("attention_mask")}
        how: dict[str, Any] = {"sampler": self._sampler, "batch_size": len(context), "pad_token_id": pad}
        how["decoding"] = "average"
        how["max_new_tokens"] = max_length - context.shape[1]
        how["stopping_criteria"] = StoppingCriteriaList([StopStringCriteria(self.tokenizer, stop)])
        answers = posterior_generate(self.model, inputs, self._samples, self._seed, **how, **options)
        return torch.cat([context.cpu(), answers.tokens.masked_fill(~answers.mask, pad)], dim=1)


def _log_mean(log_likelihoods: Tensor) -> Tensor:
    """log of the mean over draws, (S, n) → (n,)."""
    return torch.logsumexp(log_likelihoods, dim=0) - math.log(len(log_likelihoods))


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
