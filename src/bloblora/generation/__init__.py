"""Open-ended text under weight samples, and how sure the model is of it."""

from .text import Agree, Generation, clusters, normalized, posterior_generate, same_text

__all__ = ["Agree", "Generation", "clusters", "normalized", "posterior_generate", "same_text"]
