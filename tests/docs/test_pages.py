"""Every code block of the README and of the docs is run, or says why it isn't."""

import pytest

from tests.docs.blocks import PAGES, SHOWN_ONLY, blocks_of

BLOCKS = {page: blocks_of(page) for page in PAGES}
NOT_RUN = [block for blocks in BLOCKS.values() for block in blocks if block.not_run is not None]
RUN = {page: [block for block in blocks if block.not_run is None] for page, blocks in BLOCKS.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [page for page in PAGES if RUN[page]])
def test_the_blocks_of_a_page_run(page, reader_of):
    reader = reader_of(page)
    for block in RUN[page]:
        assert block.language, f"{block.place}: a block without a language; fence it as ```sh, ```python, … or ```text"
        if block.language not in SHOWN_ONLY:
            try:
                reader.run(block)
            except Exception as error:
                raise AssertionError(f"{block.place}: {type(error).__name__}: {error}") from error


@pytest.mark.parametrize("block", NOT_RUN, ids=lambda block: block.place)
def test_a_block_that_is_not_run_says_why(block):
    """Shown as skipped, so that pytest's summary lists them."""
    assert block.not_run, f"{block.place}: give a reason: <!-- not run: needs a GPU -->"
    pytest.skip(f"{block.place}: {block.not_run}")
