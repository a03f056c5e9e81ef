"""One tiny base model with adapters for all end-to-end tests, and one server that most of them share."""

import pytest

from support.adapters import ALL_TARGETS, make_adapter
from support.live import live_server
from support.models import make_checkpoint
from support.tokenizers import make_tokenizer_files

NUM_ADAPTERS = 8


@pytest.fixture(scope="session")
def base_path(tmp_path_factory):
    path = make_checkpoint(
        tmp_path_factory.mktemp("live") / "tiny-base", "llama", vocab_size=400, max_position_embeddings=512
    )
    return make_tokenizer_files(path, vocab_size=400)


@pytest.fixture(scope="session")
def adapters_dir(base_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    for index in range(NUM_ADAPTERS):
        targets = ALL_TARGETS if index % 2 else ["q_proj", "v_proj"]
        make_adapter(folder / f"adapter-{index}", base_path, seed=index, r=2 ** (index % 4), target_modules=targets)
    return folder


@pytest.fixture(scope="module")
def server(base_path, adapters_dir, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "server.log"
    arguments = [str(base_path), "--adapters-dir", str(adapters_dir), "--dtype", "float32", "--max-num-seqs", "64"]
    with live_server(arguments, log) as running:
        yield running
