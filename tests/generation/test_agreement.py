import pytest

from bloblora.generation import clusters, normalized, same_text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Carbon-dioxide!\n", "carbondioxide"),
        ("an apple, a day", "apple day"),
        ("Straße", "strasse"),
        ("theatre and another", "theatre and another"),
        ("A", "a"),
        ("?!", "?!"),
        ("", ""),
    ],
)
def test_normalized(text, expected):
    assert normalized(text) == expected


def test_same_text():
    assert same_text("The sun.", "sun")
    assert not same_text("The sun", "The moon")


def test_clusters_by_a_given_relation():
    texts = ["one", "two", "uno", "three", "dos", "one"]
    numbers = {"one": 1, "uno": 1, "two": 2, "dos": 2, "three": 3}
    assert clusters(texts, lambda a, b: numbers[a] == numbers[b]) == [0, 1, 0, 2, 1, 0]
    assert clusters(texts) == [0, 1, 2, 3, 4, 0]
    assert clusters([]) == []
