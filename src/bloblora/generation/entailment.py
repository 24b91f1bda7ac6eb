"""Whether two texts mean the same, by a model of natural language inference."""

from __future__ import annotations

import torch
from transformers import AutoModelForSequenceClassification

from .. import models
from ..messages import quoted


class Entailment:
    """Whether two answers entail each other: the relation of Kuhn, Gal & Farquhar (arXiv 2302.09664), both directions.

    A model of natural language inference, such as microsoft/deberta-large-mnli, says of premise and hypothesis which of
    its labels is the most probable. As in the paper each answer stands after its prompt. What was asked once is kept.

    Args:
        model: a folder, or a name on the hub, of a sequence classifier of pairs that has a label ``entailment``.
        max_length: tokens of a pair, from its end cut off.

    Raises:
        ModelError: it can't be loaded, lacks a trained head, or has no such label.
    """

    def __init__(self, model: str, max_length: int = 512) -> None:
        path = models.resolve(model)
        self._tokenizer = models.load_tokenizer(model)
        try:
            self._model, found = AutoModelForSequenceClassification.from_pretrained(
                path, use_safetensors=True, output_loading_info=True
            )
        except (OSError, ValueError) as error:
            raise models.ModelError(f"nli:{model}: it can't be loaded as a sequence classifier: {error}") from error
        self._model.eval()
        labels = {number: str(label) for number, label in self._model.config.id2label.items()}
        entails = [number for number, label in labels.items() if label.lower() == "entailment"]
        if len(entails) != 1 or found["missing_keys"]:
            known = ", ".join(map(quoted, labels.values()))
            raise models.ModelError(
                f"nli:{model}: must be a trained classifier with a label 'entailment'; its labels are {known}, and "
                f"{len(found['missing_keys'])} of its weights are missing"
            )
        self._entails, self._max_length = entails[0], max_length
        self._known: dict[tuple[str, str], bool] = {}

    def __call__(self, first: str, second: str) -> bool:
        """Whether each of two texts entails the other."""
        key = (min(first, second), max(first, second))
        if key not in self._known:
            self._known[key] = self._asked(*key)
        return self._known[key]

    def after(self, prompt: str, answer: str) -> str:
        """What is compared of an answer to a prompt."""
        return f"{prompt} {answer}".strip()

    @torch.no_grad()
    def _asked(self, first: str, second: str) -> bool:
        pairs = [first, second], [second, first]
        limit = min(self._max_length, self._tokenizer.model_max_length)
        inputs = self._tokenizer(*pairs, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        return bool((self._model(**inputs).logits.argmax(-1) == self._entails).all())
