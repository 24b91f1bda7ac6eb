"""Open-ended text under draws of the weights, and how sure the model is of it."""

from .agreement import Agree, clusters, normalized, same_text
from .generate import posterior_generate
from .generation import Generation

__all__ = ["Agree", "Generation", "clusters", "normalized", "posterior_generate", "same_text"]
