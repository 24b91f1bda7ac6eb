import pytest

from bloblora.generation import clusters, find_agree, normalized, same_text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Carbon-dioxide!\n", "carbondioxide"),
        ("an apple, a day", "apple day"),
        ("Straße", "strasse"),
        ("theatre and another", "theatre and another"),
        ("A", "a"),
        ("(A)", "a"),
        ("The.", "the"),
        ("?!", "?!"),
        ("", ""),
    ],
)
def test_normalized(text, expected):
    assert normalized(text) == expected


def test_same_text():
    assert same_text("The sun.", "sun")
    assert not same_text("The sun", "The moon")
    assert all(same_text(answer, "A") for answer in ("A.", "(A)", " a)\n", "A:"))
    assert not same_text("(A)", "B")


def test_a_similarity_is_no_relation(tmp_path):
    """0.3 would count as the same."""
    (tmp_path / "user.py").write_text("def like(a, b):\n    return 0.3\n\ndef same(a, b):\n    return a[0] == b[0]\n")
    with pytest.raises(ValueError, match=r"agree: matcher .*user.py:like gave 0\.3; it must give True or False"):
        find_agree(f"{tmp_path / 'user.py'}:like")
    assert find_agree(f"{tmp_path / 'user.py'}:same")("iron", "island")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(ValueError, match=r"got '.*broken.py:same': ZeroDivisionError: division by zero, or nli:MODEL"):
        find_agree(f"{tmp_path / 'broken.py'}:same")


def test_clusters_by_a_given_relation():
    texts = ["one", "two", "uno", "three", "dos", "one"]
    numbers = {"one": 1, "uno": 1, "two": 2, "dos": 2, "three": 3}
    assert clusters(texts, lambda a, b: numbers[a] == numbers[b]) == [0, 1, 0, 2, 1, 0]
    assert clusters(texts) == [0, 1, 2, 3, 4, 0]
    assert clusters([]) == []
