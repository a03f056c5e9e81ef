from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pomona.text.tokenizer import Tokenizer
from support.server import Served, serve
from support.tokenizers import make_tokenizer_files


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serve(tmp_path) as running:
        yield running


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(make_tokenizer_files(tmp_path_factory.mktemp("tokenizer")))
