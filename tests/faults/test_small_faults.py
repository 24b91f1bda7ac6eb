"""Input that was found to be taken in silence, or refused only after the work."""

import pytest

from bloblora.data import DataError, read_records
from bloblora.files import read_json


def test_equal_keys_are_refused(tmp_path):
    file = tmp_path / "run.json"
    file.write_text('{"a": {"b": 1, "b": 2}}')
    with pytest.raises(ValueError, match=r"run\.json: not readable as JSON: key 'b' is there twice"):
        read_json(file, ValueError)
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "a", "text": "b", "label": "x"}\n')
    with pytest.raises(DataError, match=r"data\.jsonl:1: not valid JSON: key 'text' is there twice"):
        read_records(data)


def test_half_a_surrogate_pair_in_an_id_is_refused_before_the_work(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "a", "label": "x", "id": ["\\udc00"]}\n')
    with pytest.raises(DataError, match=r"data\.jsonl:1: field 'id': .* has half a surrogate pair"):
        read_records(data)
