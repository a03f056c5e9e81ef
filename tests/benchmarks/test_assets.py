"""Generated models, tokenizers and adapters are what the shape says, and usable."""

import json

import pytest
from safetensors.torch import load_file

from benchmarks import assets
from benchmarks.roofline import SequenceWork, step_costs
from benchmarks.shapes import TINY
from pomona.model.hf_config import read_spec
from pomona.text.tokenizer import Tokenizer


def test_the_checkpoint_holds_as_many_parameters_as_the_shape_says(tiny_cache):
    weights = load_file(tiny_cache / "tiny" / "model" / "model.safetensors")
    assert sum(weight.numel() for weight in weights.values()) == TINY.num_parameters
    spec = read_spec(tiny_cache / "tiny" / "model")
    assert (spec.hidden_size, spec.num_layers, spec.vocab_size, spec.dtype) == (128, 2, 1024, "bfloat16")


@pytest.mark.parametrize("name", ["r4-00", "r16-01", "r128-00"])
def test_an_adapter_holds_as_many_parameters_as_the_roofline_charges_for_it(tiny_cache, name):
    folder = tiny_cache / "tiny" / "adapters" / name
    lora_rank = json.loads((folder / "adapter_config.json").read_text())["r"]
    num_bytes = sum(weight.nbytes for weight in load_file(folder / "adapter_model.safetensors").values())
    assert num_bytes == 2 * TINY.lora_parameters(lora_rank)
    assert num_bytes == step_costs(TINY, [SequenceWork(1, 1, 0)], [lora_rank])["lora"].bytes


def test_adapters_differ_and_come_out_the_same_when_made_again(tiny_cache, tmp_path):
    folder = tiny_cache / "tiny" / "adapters"
    first = (folder / "r16-00" / "adapter_model.safetensors").read_bytes()
    assert first != (folder / "r16-01" / "adapter_model.safetensors").read_bytes()
    assets.write_adapter(TINY, tmp_path, 16, seed=0)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == first


def test_the_tokenizer_has_a_token_for_every_id_and_reads_back_what_it_wrote(tiny_cache):
    tokenizer = Tokenizer.load(tiny_cache / "tiny" / "model")
    assert tokenizer.vocab_size == TINY.vocab_size
    text = "zebras and 'quotes': ü €\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("abab")) < 4


def test_the_adapters_of_a_mixed_batch_are_one_large_and_many_small():
    folders = assets.adapter_folders(TINY)
    assert len({folder for folder, _, _ in folders}) == len({seed for _, _, seed in folders}) == len(folders)
    assert [rank for _, rank, _ in folders].count(16) == 32
    assert [rank for _, rank, _ in folders].count(4) == 32
    assert [rank for _, rank, _ in folders].count(128) == 1


def test_a_folder_that_is_there_is_kept_and_one_that_failed_leaves_nothing(tmp_path):
    def fail(folder):
        (folder / "half").write_text("x")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        assets._whole(tmp_path / "a", fail)
    assert not (tmp_path / "a").exists()
    assets._whole(tmp_path / "a", lambda folder: (folder / "file").write_text("whole"))
    assets._whole(tmp_path / "a", fail)
    assert (tmp_path / "a" / "file").read_text() == "whole"
