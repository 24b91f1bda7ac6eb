"""Open-ended text under weight samples, and how sure the model is of it."""

from .asking import Entailment, p_true
from .claims import claim_tokens, sentences
from .matching import MATCHERS, Matcher, find_agree, find_matcher
from .scoring import score
from .text import Agree, Generation, clusters, normalized, posterior_generate, same_text
from .tokens import TokenScores

__all__ = [
    "MATCHERS",
    "Agree",
    "Entailment",
    "Generation",
    "Matcher",
    "TokenScores",
    "claim_tokens",
    "clusters",
    "find_agree",
    "find_matcher",
    "normalized",
    "p_true",
    "posterior_generate",
    "same_text",
    "score",
    "sentences",
]
