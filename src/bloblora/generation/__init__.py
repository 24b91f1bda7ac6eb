"""Open-ended text under weight samples, and how sure the model is of it."""

from .claims import claim_tokens, sentences
from .matching import MATCHERS, Matcher, find_matcher
from .scoring import score
from .text import Agree, Generation, clusters, normalized, posterior_generate, same_text
from .tokens import TokenScores

__all__ = [
    "MATCHERS",
    "Agree",
    "Generation",
    "Matcher",
    "TokenScores",
    "claim_tokens",
    "clusters",
    "find_matcher",
    "normalized",
    "posterior_generate",
    "same_text",
    "score",
    "sentences",
]
