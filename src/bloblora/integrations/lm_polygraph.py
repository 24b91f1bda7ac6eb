r"""Runs in lm-polygraph: its model of a run, and an estimator of each of our scores.

    from lm_polygraph import estimate_uncertainty
    from bloblora import runs
    from bloblora.integrations.lm_polygraph import BlobEstimator, white_box

    run = runs.load_run("runs/answers")
    estimate_uncertainty(white_box(run), BlobEstimator(run, "tokur_epistemic"), "Which gas do plants take in?")

lm-polygraph writes the text, by the posterior mean, and its own estimators are of that single function. Ours say what
weight draws think of the text that it wrote.
"""

import copy
from typing import Any

import numpy as np
import torch
from lm_polygraph import WhiteboxModel
from lm_polygraph.estimators.estimator import Estimator
from lm_polygraph.utils.generation_parameters import GenerationParameters

from ..decision.correctness import SIGNS
from ..generation import TokenScores, score
from ..generation.tokens import SCORES
from ..runs import PredictionOptions, Run, RunError


def white_box(run: Run, max_new_tokens: int = 64) -> WhiteboxModel:
    """The run's posterior mean as a model of lm-polygraph, which writes text.

    The run's attention is made transformers' ``eager`` one, because lm-polygraph reads the attention weights.

    Args:
        run: of `bloblora train --task generation`.
        max_new_tokens: of an answer, where lm-polygraph is told no other number.

    Raises:
        RunError: the run isn't of text, or its mean has no weights that write.
    """
    _check(run)
    model: Any = run.model
    model.set_attn_implementation("eager")
    config: Any = model.config
    tokenizer = copy.copy(run.tokenizer)
    tokenizer.padding_side = "right" if config.is_encoder_decoder else "left"
    kind = "Seq2SeqLM" if config.is_encoder_decoder else "CausalLM"
    written = GenerationParameters(max_new_tokens=max_new_tokens)
    return WhiteboxModel(model, tokenizer, run.config.output, kind, written)


class BlobEstimator(Estimator):
    """One of our scores of a text that lm-polygraph's model wrote, as its uncertainty: higher is less certain.

    Args:
        run: whose weights are drawn; of `bloblora train --task generation`, also another one than the writer's, with
            the same tokenizer.
        name: one of `bloblora.generation.tokens.SCORES`.
        num_samples: weight draws N; 0 is the posterior mean.
        seed: of the draws.

    Raises:
        RunError: the run isn't of text, or an argument is out of its range.
    """

    def __init__(self, run: Run, name: str = "sequence_log_probability", num_samples: int = 10, seed: int = 0) -> None:
        _check(run)
        PredictionOptions(samples=num_samples, seed=seed)
        if name not in SCORES:
            raise RunError(f"name must be one of {', '.join(SCORES)}, got {name!r}")
        self._run, self._name, self._how = run, name, (num_samples, seed)
        super().__init__(["input_texts", "greedy_tokens"], "sequence")

    def __str__(self) -> str:
        samples, seed = self._how
        return f"bloblora_{self._name}_{samples}_{seed}"

    def __call__(self, stats: dict[str, Any]) -> np.ndarray:
        """Uncertainties (n,) of the texts, with their end."""
        writer = stats["model"]
        prompts = [writer.tokenize([text])["input_ids"][0].tolist() for text in stats["input_texts"]]  # not padded
        responses = [[*map(int, response)] for response in stats["greedy_tokens"]]
        found: TokenScores = score(self._run.model, prompts, responses, *self._how, sampler=self._run.sampler)
        values: torch.Tensor = getattr(found, self._name)
        return (-SIGNS[self._name] * values).double().numpy()


def _check(run: Run) -> None:
    if run.task.kind != "generation":
        raise RunError(
            f"the run's task is {run.task.name}; lm-polygraph takes one of `bloblora train --task generation`"
        )
    if not run.method.writes_text:
        raise RunError("the run's draws are no weights that write; take a run of another method")
