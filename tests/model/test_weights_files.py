"""Loading weights: every layout of files, every storage dtype, and what is wrong is named."""

import errno
import gc
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pomona.core.errors import CheckpointError
from pomona.kernels.linear import unpack
from pomona.model.hf_config import read_spec
from pomona.model.spec import Target
from pomona.model.weights import DecoderWeights, Quantization, load_weights
from support.models import edit_config, make_checkpoint

CPU = torch.device("cpu")
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def _load(folder: Path, dtype: torch.dtype = torch.float32) -> DecoderWeights:
    return load_weights(folder, read_spec(folder), dtype, CPU)


def _rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Apply ``change`` to the tensors of an unsharded safetensors checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "llama", attention_bias=True)


def test_fused_sites_hold_the_targets_one_after_the_other(llama: Path) -> None:
    tensors, weights = load_file(llama / "model.safetensors"), _load(llama)
    prefix = "model.layers.1.self_attn"
    parts = [tensors[f"{prefix}.{name}.weight"] for name in ("q_proj", "k_proj", "v_proj")]
    biases = [tensors[f"{prefix}.{name}.bias"] for name in ("q_proj", "k_proj", "v_proj")]
    sites = {site.name: unpack(weight) for site, weight in weights.layers[1].sites.items()}
    assert torch.equal(sites["QKV"], torch.cat(parts))
    assert torch.equal(weights.target_weight(1, Target.V), parts[2])
    bias = weights.target_bias(1, Target.K)
    assert bias is not None
    assert torch.equal(bias, biases[1])
    assert weights.target_bias(1, Target.UP) is None
    assert torch.equal(weights.target_weight(0, Target.UP), tensors["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(weights.norm_weight(-1, "norm"), tensors["model.norm.weight"])
    assert torch.equal(weights.norm_weight(0, "input_layernorm"), tensors["model.layers.0.input_layernorm.weight"])


@pytest.mark.parametrize("layout", ["sharded safetensors", "bin", "legacy bin", "sharded bin"])
def test_every_file_layout_loads_to_the_same_weights(layout: str, tmp_path: Path) -> None:
    expected = _load(make_checkpoint(tmp_path / "single"))
    folder = tmp_path / "other"
    if layout == "sharded safetensors":
        make_checkpoint(folder, max_shard_size="50KB")
        assert len(list(folder.glob("model-*.safetensors"))) > 2
    else:
        make_checkpoint(folder, file_format="bin")
        tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
        if layout == "legacy bin":
            torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
        if layout == "sharded bin":
            (folder / "pytorch_model.bin").unlink()
            names = sorted(tensors)
            weight_map = {name: f"pytorch_model-{1 + i % 2}.bin" for i, name in enumerate(names)}
            for file in set(weight_map.values()):
                torch.save({name: tensors[name] for name in names if weight_map[name] == file}, folder / file)
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    actual = _load(folder)
    assert torch.equal(unpack(actual.embed), unpack(expected.embed))
    assert torch.equal(unpack(actual.lm_head), unpack(expected.lm_head))
    for ours, theirs in zip(actual.layers, expected.layers, strict=True):
        assert all(torch.equal(unpack(ours.sites[site]), unpack(theirs.sites[site])) for site in ours.sites)
        assert all(torch.equal(ours.norms[name], theirs.norms[name]) for name in ours.norms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("storage_dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_any_storage_dtype_is_cast_to_the_serving_dtype(
    storage_dtype: torch.dtype, dtype: torch.dtype, tmp_path: Path
) -> None:
    make_checkpoint(tmp_path, storage_dtype=storage_dtype)
    weights = _load(tmp_path, dtype)
    assert weights.dtype == dtype
    stored = load_file(tmp_path / "model.safetensors")[Q_PROJ]
    assert stored.dtype == storage_dtype
    assert torch.equal(weights.target_weight(1, Target.Q), stored.to(dtype))


@pytest.mark.parametrize("storage_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [1e5, -1e5])
def test_a_weight_that_float16_cannot_hold_is_refused_by_name(
    storage_dtype: torch.dtype, value: float, tmp_path: Path
) -> None:
    folder = make_checkpoint(tmp_path, storage_dtype=storage_dtype)
    _rewrite(folder, lambda tensors: tensors[Q_PROJ].__setitem__((3, 5), value))
    with pytest.raises(CheckpointError, match=rf"tensor {Q_PROJ} is not finite in float16: choose another dtype"):
        _load(folder, torch.float16)
    assert _load(folder, torch.bfloat16).target_weight(1, Target.Q)[3, 5] == torch.tensor(value).bfloat16()


def test_a_weight_that_only_float64_can_hold_is_refused_by_name(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, storage_dtype=torch.float64)
    _rewrite(folder, lambda tensors: tensors[Q_PROJ].__setitem__((3, 5), 1e40))
    with pytest.raises(CheckpointError, match=rf"tensor {Q_PROJ} is not finite in float32: choose another dtype"):
        _load(folder)


def test_a_tied_head_is_the_embedding_itself_whether_or_not_it_is_stored(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, tie_word_embeddings=True)
    weights = _load(tmp_path)
    assert weights.lm_head is weights.embed
    num_bytes = weights.num_bytes
    _rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    weights = _load(tmp_path)
    assert weights.lm_head is weights.embed
    assert weights.num_bytes == num_bytes


def test_a_tied_head_that_differs_is_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, tie_word_embeddings=True)
    _rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs .*tie_word_embeddings"):
        _load(tmp_path)


def test_progress_ends_at_the_total_and_never_goes_back(llama: Path) -> None:
    seen: list[tuple[int, int]] = []
    load_weights(llama, read_spec(llama), torch.bfloat16, CPU, lambda done, total: seen.append((done, total)))
    num_bytes = sum(2 * tensor.numel() for tensor in load_file(llama / "model.safetensors").values())
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert {total for _, total in seen} == {num_bytes}
    assert seen[-1][0] == num_bytes


def _held_bytes() -> int:
    """Memory of all tensors that there are."""
    tensors = [thing for thing in gc.get_objects() if type(thing) is Tensor and thing.layout is torch.strided]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages if storage.data_ptr()}.values())


@pytest.mark.parametrize("is_tied", [True, False])
def test_int8_weights_are_made_while_the_checkpoint_is_read(is_tied: bool, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, tie_word_embeddings=is_tied)
    spec, before, held = read_spec(tmp_path), _held_bytes(), [0]

    def count(done: int, total: int) -> None:
        if done == total:
            held.append(_held_bytes() - before)

    weights = load_weights(tmp_path, spec, torch.float32, CPU, count, Quantization.INT8)
    mapped = 4 * spec.vocab_size * spec.hidden_size  # at most: the tensor that was copied last
    assert 0 < held[-1] <= weights.num_bytes + mapped


def test_known_buffers_are_ignored(llama: Path) -> None:
    _rewrite(llama, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    _load(llama)


def test_a_missing_tensor_is_named_with_the_shape_expected(llama: Path) -> None:
    _rewrite(llama, lambda tensors: tensors.pop(Q_PROJ))
    with pytest.raises(CheckpointError, match=rf"tensor {Q_PROJ} is missing, expected shape \[64, 64\]"):
        _load(llama)


def test_an_untied_model_without_a_head_is_refused(llama: Path) -> None:
    _rewrite(llama, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing"):
        _load(llama)


def test_an_unexpected_tensor_is_named(llama: Path) -> None:
    edit_config(llama, attention_bias=False)
    with pytest.raises(CheckpointError, match=r"no place for tensor .*k_proj\.bias \(and 7 more\)"):
        _load(llama)


def test_a_wrong_shape_is_named_with_both_shapes_before_anything_is_loaded(llama: Path) -> None:
    _rewrite(llama, lambda tensors: tensors.update({Q_PROJ: torch.zeros(64, 32)}))
    seen: list[int] = []
    with pytest.raises(CheckpointError, match=rf"{Q_PROJ} has shape \[64, 32\], expected \[64, 64\]"):
        load_weights(llama, read_spec(llama), torch.float32, CPU, lambda done, total: seen.append(done))
    assert seen == []


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bool], ids=str)
def test_quantized_tensors_are_refused(dtype: torch.dtype, llama: Path) -> None:
    _rewrite(llama, lambda tensors: tensors.update({Q_PROJ: torch.zeros(64, 64).to(dtype)}))
    with pytest.raises(CheckpointError, match=rf"{Q_PROJ} is .*quantized"):
        _load(llama)


def test_a_tensor_stored_twice_is_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, max_shard_size="50KB")
    first, second = sorted(tmp_path.glob("model-*.safetensors"))[:2]
    save_file({**load_file(first), **load_file(second)}, second)
    with pytest.raises(CheckpointError, match=r"is in model-0000.* too"):
        _load(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, -1])
@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
def test_a_truncated_file_is_refused_by_name(file_format: str, keep: float, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, file_format=file_format)
    path = tmp_path / ("model.safetensors" if file_format == "safetensors" else "pytorch_model.bin")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if keep == 0.5 else int(keep)])
    with pytest.raises(CheckpointError, match=path.name):
        _load(tmp_path)


def test_a_file_that_may_not_be_read_is_not_called_corrupt(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    (llama / "model.safetensors").write_bytes(b"as safetensors sees it")
    spec = read_spec(llama)
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read: Permission denied"):
        load_weights(llama, spec, torch.float32, CPU)


@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
def test_a_file_of_garbage_is_refused_by_name(file_format: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, file_format=file_format)
    path = tmp_path / ("model.safetensors" if file_format == "safetensors" else "pytorch_model.bin")
    path.write_bytes(bytes(range(256)) * 50)
    with pytest.raises(CheckpointError, match=path.name):
        _load(tmp_path)


class _Bomb:
    """Unpickling it creates the folder."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_pickle_that_would_run_code_does_not(writer: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", file_format="bin")
    bomb = {"model.norm.weight": _Bomb(str(tmp_path / "ran"))}
    path = folder / "pytorch_model.bin"
    if writer == "torch":
        torch.save(bomb, path)
    else:
        path.write_bytes(pickle.dumps(bomb))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        _load(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        ([torch.zeros(1)], "holds a list"),
        ({"state_dict": {"model.norm.weight": torch.zeros(64)}}, "'state_dict' is not a named dense tensor"),
        ({3: torch.zeros(1)}, "entry 3"),
        ({"model.norm.weight": torch.zeros(64).to_sparse()}, "not a named dense tensor"),
    ],
)
def test_a_bin_file_of_other_things_is_refused(content: object, message: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, file_format="bin")
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=message):
        _load(tmp_path)


def test_a_folder_without_weights_says_what_was_looked_for(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no weights found; looked for model\.safetensors, .*pytorch_model\.bin"):
        _load(llama)


@pytest.mark.parametrize(
    "index, message",
    [
        ({}, "weight_map is missing"),
        ({"weight_map": {"lm_head.weight": "gone.safetensors"}}, r"the shard gone\.safetensors is missing"),
        ({"weight_map": {"lm_head.weight": "../llama/model.safetensors"}}, "not the name of a file in the same folder"),
        ({"weight_map": {"lm_head.weight": 3}}, "the shard 3 is missing"),
        ({"weight_map": {"lm_head.weight": ["a"]}}, r"the shard \['a'\] is missing"),
    ],
)
def test_a_bad_index_is_refused(index: dict[str, object], message: str, llama: Path) -> None:
    (llama / "model.safetensors").rename(llama / "other.safetensors")
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        _load(llama)
