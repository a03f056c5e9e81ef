from pathlib import Path

import pytest

from pomona.text.tokenizer import Tokenizer
from support.tokenizers import make_tokenizer_files


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(make_tokenizer_files(tmp_path_factory.mktemp("byte_level")))


@pytest.fixture(scope="session")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(make_tokenizer_files(tmp_path_factory.mktemp("sentencepiece"), kind="sentencepiece"))


@pytest.fixture(params=["byte_level", "sentencepiece"], scope="session")
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tokenizer_files(tmp_path)
