"""Rows on the disk are what the same rows in a list are."""

import tracemalloc

import pyarrow as pa
import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from torch.utils.data import DataLoader

from bloblora.data import MappedRows, read_batches, write_rows
from tests.tiny_base import write_jsonl

ROWS = [{"text": f"tëxt {i}", **({"label": i % 3} if i % 2 else {})} for i in range(2500)]


@pytest.fixture
def mapped(tmp_path):
    write_rows(tmp_path / "rows.arrow", iter(ROWS))
    return MappedRows(tmp_path / "rows.arrow")


def test_reads_as_a_list_does(mapped):
    assert (len(mapped), list(mapped)) == (2500, ROWS)
    assert mapped[7] == ROWS[7]
    assert mapped[-1] == ROWS[-1]
    assert list(mapped[10:2000:700]) == ROWS[10:2000:700]
    assert list(mapped.select([5, 3, 3])) == [ROWS[5], ROWS[3], ROWS[3]]
    assert list(mapped.select([9, 8, 7]).select([2, 0])) == [ROWS[7], ROWS[9]]
    with pytest.raises(IndexError):
        mapped[2500]


def test_feeds_torchs_loader_also_from_workers(mapped):
    for workers in (0, 1):
        loader = DataLoader(mapped, batch_size=1000, collate_fn=list, num_workers=workers)
        assert [row for batch in loader for row in batch] == ROWS


def test_no_rows(tmp_path):
    write_rows(tmp_path / "rows.arrow", [])
    assert list(MappedRows(tmp_path / "rows.arrow")) == []


def as_table(records, file):
    texts = [record["text"] for record in records]
    separator = "\t" if file.suffix == ".tsv" else ","
    file.write_text("".join(f"{separator.join(row)}\n" for row in [("text", "label"), *((t, "a") for t in texts)]))


def as_parquet(records, file):
    # one row group, the worst case
    parquet.write_table(pa.Table.from_pylist(records), file, row_group_size=len(records))


WRITERS = {
    "jsonl": lambda records, file: write_jsonl(file, records),
    "csv": as_table,
    "tsv": as_table,
    "parquet": as_parquet,
    "folder": lambda records, file: Dataset.from_list(records).save_to_disk(file),
}


LONG_TSV = pytest.param("tsv", marks=pytest.mark.long)  # read as CSV is


@pytest.mark.parametrize("more", [10_000, pytest.param(20_000, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", [kind for kind in WRITERS if kind != "tsv"] + [LONG_TSV])
def test_batches_of_a_long_file_take_no_more_memory_than_those_of_a_short_one(kind, more, tmp_path):
    peaks = []
    for size in (2000, 2000 + more):
        records = [{"text": f"{i} {'word ' * 20}", "label": "a"} for i in range(size)]
        file = tmp_path / f"{size}.{kind}"
        WRITERS[kind](records, file)
        pool = pa.system_memory_pool()
        before = pa.set_memory_pool(pool) or pool.bytes_allocated()
        tracemalloc.start()
        read = pooled = 0
        for batch in read_batches(file, 256):
            read += len(batch)
            pooled = max(pooled, pool.bytes_allocated() - before)
        peaks.append(tracemalloc.get_traced_memory()[1] + pooled)
        tracemalloc.stop()
        assert read == size
    # A record is 400 bytes and more as a dict, 10,000 of them 4 MB; of Parquet a page and a buffer are in memory.
    assert peaks[1] - peaks[0] < 3e6, peaks


_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    # "Cs": half a surrogate pair, which is no text
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner),
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.dictionaries(st.sampled_from(["text", "label", "messages"]), _VALUES), min_size=1, max_size=5))
def test_rows_are_as_they_went_in(rows, tmp_path):
    write_rows(tmp_path / "rows.arrow", rows)
    assert [*MappedRows(tmp_path / "rows.arrow")] == rows
