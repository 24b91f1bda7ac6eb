"""Whether texts say the same, and the groups that do."""

import re
import unicodedata
from collections.abc import Callable, Sequence

Agree = Callable[[str, str], bool]
"""Whether two answers mean the same: a symmetric relation, so of an entailment model both directions."""


def normalized(text: str) -> str:
    """The text without case, punctuation, articles and surplus white space, as SQuAD compares answers.

    Rajpurkar et al., arXiv 1606.05250. A text of which nothing is left keeps all but its case and outer white space.
    """
    lower = unicodedata.normalize("NFKC", text).casefold()
    bare = "".join(character for character in lower if unicodedata.category(character)[0] != "P")
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split()) or lower.strip()


def same_text(first: str, second: str) -> bool:
    """Whether two texts are equal once `normalized`."""
    return normalized(first) == normalized(second)


def clusters(texts: Sequence[str], agree: Agree = same_text) -> list[int]:
    """Number of the cluster of each text, from 0 in order of first appearance.

    A text joins the first cluster whose first text it agrees with (Kuhn, Gal & Farquhar, arXiv 2302.09664).
    """
    firsts: list[str] = []
    found = []
    for text in texts:
        number = next((i for i, first in enumerate(firsts) if first == text or agree(first, text)), len(firsts))
        if number == len(firsts):
            firsts.append(text)
        found.append(number)
    return found
