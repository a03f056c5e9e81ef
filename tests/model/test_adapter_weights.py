"""Adapter files, good and bad: what is converted, what is refused and with which words."""

import dataclasses
import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from pomona.adapters.peft_config import parse_config
from pomona.adapters.sources import read_files
from pomona.adapters.targets import resolve
from pomona.core.adapter import AdapterFiles
from pomona.core.errors import AdapterError
from pomona.model import adapter_weights
from pomona.model.adapter_modules import map_modules
from pomona.model.adapter_state import parse_tensors
from pomona.model.adapter_weights import AdapterLoader, AdapterWeights
from pomona.model.lora import PageLayout
from pomona.model.spec import Site, Target
from pomona.model.weights import Quantization
from support.adapters import ALL_TARGETS, ROWS_PER_PAGE, AdaptedDecoder, make_adapter
from support.models import ARCHITECTURES, load_transformers, make_checkpoint

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
Tensors = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Kit:
    """A base model, and one adapter for it as bytes."""

    base: Path
    decoder: AdaptedDecoder
    files: AdapterFiles
    tensors: Tensors

    def load(self, files: AdapterFiles | None = None, loader: AdapterLoader | None = None) -> AdapterWeights:
        files, loader = files or self.files, loader or self.decoder.loader
        return loader.load(resolve(parse_config(files.config_bytes), loader.modules), parse_tensors(files))

    def with_tensors(self, tensors: Tensors) -> AdapterFiles:
        return dataclasses.replace(self.files, weights_bytes=safetensors.torch.save(tensors))

    def with_config(self, **fields: Any) -> AdapterFiles:
        config = json.loads(self.files.config_bytes) | fields
        return dataclasses.replace(self.files, config_bytes=json.dumps(config).encode())

    def with_bin(self, content: Any) -> AdapterFiles:
        buffer = io.BytesIO()
        torch.save(content, buffer)
        return dataclasses.replace(self.files, weights_bytes=buffer.getvalue(), weights_format="bin")


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    folder = tmp_path_factory.mktemp("kit")
    base = make_checkpoint(folder / "base", "qwen2", num_hidden_layers=2)
    files = read_files(str(make_adapter(folder / "adapter", base, r=6, target_modules=ALL_TARGETS)))
    return Kit(base, AdaptedDecoder(base), files, safetensors.torch.load(files.weights_bytes))


def assert_same(first: AdapterWeights, second: AdapterWeights) -> None:
    assert torch.equal(first.pages, second.pages)
    assert np.array_equal(first.ranks, second.ranks)
    assert np.array_equal(first.scalings, second.scalings)
    assert (first.extras is None) == (second.extras is None)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("is_tied", [False, True])
def test_module_names_are_those_of_transformers_in_order(architecture: str, is_tied: bool, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "base", architecture, tie_word_embeddings=is_tied)
    names = [name for name, _ in load_transformers(path).named_modules() if name]
    base = map_modules(AdaptedDecoder(path).decoder.spec).base
    # containers may come in another order: it decides nothing
    assert sorted(base.names) == sorted(names)
    assert [name for name in base.names if name in base.linears] == [name for name in names if name in base.linears]
    assert base.is_tied == is_tied


def test_pages_hold_every_rank_row_in_its_place_and_zeros_elsewhere(kit: Kit) -> None:
    weights = kit.load()
    assert weights.pages.shape[0] == 2  # rank 6 in pages of 4 rows
    layout = PageLayout(kit.decoder.decoder.spec, ROWS_PER_PAGE)
    num_values = 0
    for layer in range(2):
        for site in Site:
            slices = layout.slices(weights.pages, layer, site)
            for target, a, b in zip(site.value, slices.a, slices.b, strict=True):
                name = ALL_TARGETS[target]
                (prefix,) = {key.rpartition(".lora_")[0] for key in kit.tensors if f".{layer}." in key and name in key}
                a_rows, b_rows = a.flatten(0, 1), b.flatten(0, 1)
                assert torch.equal(a_rows[:6], kit.tensors[f"{prefix}.lora_A.weight"])
                assert torch.equal(b_rows[:6], kit.tensors[f"{prefix}.lora_B.weight"].T)
                assert not a_rows[6:].any()
                assert not b_rows[6:].any()
                num_values += a_rows.numel() + b_rows.numel()
    assert num_values == weights.pages.numel()
    assert (weights.ranks == 6).all()
    assert np.allclose(weights.scalings, 8 / 6)


def test_a_plain_adapter_has_no_extras_and_says_what_it_is(kit: Kit) -> None:
    weights = kit.load()
    assert weights.extras is None
    assert (weights.lora_rank, weights.features) == (6, ())
    assert set(weights.modules) == set(ALL_TARGETS)
    assert weights.num_bytes == weights.pages.numel() * 4
    assert kit.decoder.loader.num_pages(weights) == 2


def test_targets_that_are_not_adapted_have_rank_0(kit: Kit, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a", kit.base, target_modules=["o_proj"], rank_pattern={"1.self_attn.o_proj": 9})
    _, weights = kit.decoder.convert(adapter)
    assert weights.ranks.tolist() == [[0, 0, 0, 4, 0, 0, 0], [0, 0, 0, 9, 0, 0, 0]]
    assert weights.pages.shape[0] == 3


def test_extras_count_as_pages_and_move_as_one(kit: Kit, tmp_path: Path) -> None:
    adapter = make_adapter(
        tmp_path / "a", kit.base, use_dora=True, bias="all", modules_to_save=["embed_tokens", "norm", "k_proj"]
    )
    _, weights = kit.decoder.convert(adapter)
    assert weights.extras is not None
    assert weights.features == ("dora", "bias", "modules_to_save")
    page_bytes = weights.pages.shape[1] * 4
    assert kit.decoder.loader.num_pages(weights) == weights.pages.shape[0] + -(-weights.extras.num_bytes // page_bytes)
    moved = weights.extras.to(torch.device("cpu"))
    assert moved.num_bytes == weights.extras.num_bytes
    assert moved.dora_scales.keys() == weights.extras.dora_scales.keys()
    assert (0, Target.Q) in moved.dora_scales


class _LargestFloat(TorchDispatchMode):
    """Remembers the size of the largest float32 tensor that was made."""

    num_elems = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype is torch.float32:
            self.num_elems = max(self.num_elems, out.numel())
        return out


@pytest.mark.parametrize("quantization", Quantization)
@pytest.mark.parametrize(
    ("modules", "is_table_read"),
    [(ALL_TARGETS, False), (["embed_tokens", "lm_head"], True)],  # with the latter, PEFT saves the tables in float32
)
def test_dora_is_scaled_without_float32_copies_of_whole_weights(
    modules: list[str],
    is_table_read: bool,
    quantization: Quantization,
    kit: Kit,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = AdaptedDecoder(kit.base, torch.bfloat16, quantization=quantization)
    files = read_files(str(make_adapter(tmp_path / "a", kit.base, use_dora=True, target_modules=modules)))
    whole = kit.load(files, base.loader).extras
    monkeypatch.setattr(adapter_weights, "_ROWS_AT_ONCE", 8)
    with _LargestFloat() as made:
        pieces = kit.load(files, base.loader).extras
    assert made.num_elems < base.decoder.spec.hidden_size**2 or is_table_read
    assert whole is not None
    assert pieces is not None
    assert {*pieces.dora_scales} == {*whole.dora_scales}
    for ours, theirs in zip(pieces.tensors(), whole.tensors(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key.removeprefix("base_model.model."),
        lambda key: key.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."),
        lambda key: key.replace("lora_A.", "lora_A.my-adapter.").replace("lora_B.", "lora_B.my-adapter."),
        lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda key: key.removesuffix(".weight"),
    ],
)
def test_key_spellings_of_all_peft_versions_mean_the_same(rename: Callable[[str], str], kit: Kit) -> None:
    renamed = {rename(key): tensor for key, tensor in kit.tensors.items()}
    assert_same(kit.load(kit.with_tensors(renamed)), kit.load())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_are_converted(dtype: torch.dtype, kit: Kit) -> None:
    converted = {key: tensor.to(dtype) for key, tensor in kit.tensors.items()}
    pages = kit.load(kit.with_tensors(converted)).pages
    assert pages.dtype is torch.float32
    assert (pages - kit.load().pages).abs().max() < 0.02


def refuse(kit: Kit, files: AdapterFiles, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        kit.load(files)


def test_a_missing_tensor_is_named(kit: Kit) -> None:
    tensors = {key: tensor for key, tensor in kit.tensors.items() if key != f"{Q0}.lora_B.weight"}
    refuse(kit, kit.with_tensors(tensors), r"the lora_B of model\.layers\.0\.self_attn\.q_proj is missing")
    refuse(kit, kit.with_tensors({}), "is missing")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (f"{Q0}.lora_magnitude_vector", r"lora_magnitude_vector is not used by anything in adapter_config\.json"),
        (f"{Q0}.lora_B.bias", "is not used by anything"),
        (f"{Q0}.base_layer.bias", "is not used by anything"),
        ("base_model.model.model.norm.weight", "is not used by anything"),
        ("base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight", "made for another base model.*base"),
        ("base_model.model.layers.0.self_attn.q_proj.lora_A.weight", "adapts 'layers.0.self_attn.q_proj', which this"),
        ("base_model.model.transformer.h.0.attn.c_attn.lora_A.weight", "which this base model does not have"),
        ("prompt_embeddings", "not a name that PEFT gives"),
        ("", "not a name that PEFT gives"),
    ],
)
def test_an_unexpected_tensor_is_named(key: str, message: str, kit: Kit) -> None:
    refuse(kit, kit.with_tensors(kit.tensors | {key: torch.ones(4)}), message)


def test_two_spellings_of_one_tensor_are_refused(kit: Kit) -> None:
    twice = kit.tensors | {f"{Q0}.lora_A.default.weight": kit.tensors[f"{Q0}.lora_A.weight"].clone()}
    refuse(kit, kit.with_tensors(twice), "mean the same weight")


@pytest.mark.parametrize("shape", [(6, 32), (64, 6), (6,), (1, 6, 64), (0, 64), (6, 0), ()])
def test_a_wrong_shape_is_refused_with_the_expected_and_the_found_one(shape: tuple[int, ...], kit: Kit) -> None:
    wrong = kit.tensors | {f"{Q0}.lora_A.weight": torch.zeros(shape)}
    found = str(list(shape)).replace("[", r"\[").replace("]", r"\]")
    refuse(kit, kit.with_tensors(wrong), rf"q_proj\.lora_A\.weight has shape {found}, expected \[6, 64\]")


def test_a_rank_other_than_the_configs_is_refused_as_such(kit: Kit) -> None:
    refuse(kit, kit.with_config(r=8), "the weights have rank 6, the config says 8")


def test_an_adapter_of_another_base_model_is_refused_naming_its_base(kit: Kit, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other-base", "qwen2", hidden_size=32, num_attention_heads=2)
    files = read_files(str(make_adapter(tmp_path / "adapter", other)))
    refuse(kit, files, r"has shape \[4, 32\], expected \[4, 64\].*another base model \(its config names '.*other-base'")


def test_an_adapter_of_a_deeper_base_model_is_refused(kit: Kit, tmp_path: Path) -> None:
    deeper = make_checkpoint(tmp_path / "deeper", "qwen2", num_hidden_layers=3)
    files = read_files(str(make_adapter(tmp_path / "adapter", deeper)))
    refuse(kit, files, r"adapts 'model\.layers\.2\.self_attn\.[qv]_proj', which this base model does not have")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn])
def test_integers_and_exotic_types_are_refused(dtype: torch.dtype, kit: Kit) -> None:
    wrong = kit.tensors | {f"{Q0}.lora_A.weight": torch.zeros(6, 64).to(dtype)}
    refuse(kit, kit.with_tensors(wrong), r"lora_A\.weight is \w+: expected float32")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(value: float, kit: Kit) -> None:
    wrong = kit.tensors[f"{Q0}.lora_A.weight"].clone()
    wrong[3, 5] = value
    refuse(kit, kit.with_tensors(kit.tensors | {f"{Q0}.lora_A.weight": wrong}), "q_proj.lora_A.weight holds NaN or")


def test_values_the_serving_type_cannot_hold_are_refused(kit: Kit) -> None:
    half = AdaptedDecoder(kit.base, torch.float16)
    large = kit.tensors | {f"{Q0}.lora_A.weight": torch.full((6, 64), 1e6)}
    with pytest.raises(AdapterError, match=r"lora_A of .*q_proj holds values too large for float16"):
        kit.load(kit.with_tensors(large), half.loader)


def test_a_rank_that_would_take_all_memory_is_refused_before_taking_it(kit: Kit, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a", kit.base, target_modules=["v_proj"], r=40)
    loader = AdapterLoader(kit.decoder.decoder.weights, PageLayout(kit.decoder.decoder.spec, ROWS_PER_PAGE), 9)
    with pytest.raises(AdapterError, match="rank 40 needs 10 adapter pages; there are 9"):
        kit.load(read_files(str(adapter)), loader)


def test_a_rank_that_the_kernels_do_not_take_is_refused_with_the_projection_s_name(kit: Kit, tmp_path: Path) -> None:
    weights = kit.decoder.decoder.weights
    elsewhere = dataclasses.replace(weights, norm=weights.norm.to("meta"))
    names = ["v_proj", "embed_tokens", "lm_head"]
    for lora_rank in (1024, 1025):
        pattern = dict.fromkeys(("embed_tokens", "lm_head"), 1030)
        adapter = make_adapter(
            tmp_path / str(lora_rank), kit.base, target_modules=names, r=lora_rank, rank_pattern=pattern
        )
        files = read_files(str(adapter))
        if lora_rank == 1024:
            assert kit.load(files).lora_rank == 1030, "embedding and lm_head may have any rank"
        else:
            refuse(kit, files, r"the rank of model\.layers\.0\.self_attn\.v_proj is 1025: .* up to 1024")
            with pytest.raises(AdapterError, match="up to 1024"):  # by a GPU too: a CPU computes what is on its way
                kit.load(files, AdapterLoader(elsewhere, PageLayout(weights.spec, ROWS_PER_PAGE)))


def test_token_ids_past_the_vocabulary_are_refused(kit: Kit, tmp_path: Path) -> None:
    files = read_files(str(make_adapter(tmp_path / "a", kit.base, trainable_token_indices=[1, 2])))
    config = json.loads(files.config_bytes) | {"trainable_token_indices": [1, 131]}
    refuse(kit, dataclasses.replace(files, config_bytes=json.dumps(config).encode()), "holds 131, but .* 131 tokens")


def test_a_resized_vocabulary_is_refused_as_such(kit: Kit, tmp_path: Path) -> None:
    larger = make_checkpoint(tmp_path / "larger", "qwen2", vocab_size=133)
    files = read_files(str(make_adapter(tmp_path / "a", larger, modules_to_save=["lm_head"])))
    refuse(kit, files, "its vocabulary has 133 tokens, the base model's 131")


def test_tied_parts_that_differ_are_refused(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", "llama", tie_word_embeddings=True)
    decoder = AdaptedDecoder(base)
    for config in ({"modules_to_save": ["embed_tokens"]}, {"target_modules": ["embed_tokens"]}):
        adapter = make_adapter(tmp_path / str(len(str(config))), base, ensure_weight_tying=True, **config)
        file = adapter / "adapter_model.safetensors"
        tensors = safetensors.torch.load_file(file)
        (key,) = [key for key in tensors if key.endswith(("lm_head.weight", "lm_head.lora_B.weight"))]
        safetensors.torch.save_file(tensors | {key: tensors[key] + 1}, file)
        with pytest.raises(AdapterError, match="tied in this base model, but differ"):
            decoder.convert(adapter)


def test_truncated_safetensors_are_refused(kit: Kit) -> None:
    content = kit.files.weights_bytes
    for length in (0, 1, 7, 8, 100, len(content) // 2, len(content) - 1):
        refuse(kit, dataclasses.replace(kit.files, weights_bytes=content[:length]), "truncated or corrupt")
    refuse(kit, dataclasses.replace(kit.files, weights_bytes=content + b"x"), "truncated or corrupt")


@pytest.mark.parametrize("header_length", [0, 1, 2**31, 2**63])
def test_a_lying_header_length_is_refused(header_length: int, kit: Kit) -> None:
    content = struct.pack("<Q", header_length) + kit.files.weights_bytes[8:]
    refuse(kit, dataclasses.replace(kit.files, weights_bytes=content), "truncated or corrupt")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_flipped_header_bits_are_refused_or_change_nothing(data: st.DataObject, kit: Kit) -> None:
    header_length = struct.unpack("<Q", kit.files.weights_bytes[:8])[0]
    position = data.draw(st.integers(0, 8 + header_length - 1))
    content = bytearray(kit.files.weights_bytes)
    content[position] ^= 1 << data.draw(st.integers(0, 7))
    try:
        weights = kit.load(dataclasses.replace(kit.files, weights_bytes=bytes(content)))
    except AdapterError:
        return
    # what is left: the metadata, and white space
    assert_same(weights, kit.load())


class Exploit:
    """Pickles into a call of os.system."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        import os

        return os.system, (f"touch {self.canary}",)


def test_a_pickle_that_executes_code_is_refused_and_not_executed(kit: Kit, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    files = kit.with_bin({**kit.tensors, "exploit": Exploit(canary)})
    refuse(kit, files, r"adapter_model\.bin holds something other than tensors and was not executed")
    bare = dataclasses.replace(files, weights_bytes=pickle.dumps({"exploit": Exploit(canary)}))
    refuse(kit, bare, r"adapter_model\.bin is truncated, corrupt, or not written by torch\.save")
    assert not canary.exists()
    torch.load(io.BytesIO(files.weights_bytes), weights_only=False)
    assert canary.exists(), "the exploit would have worked"


def test_a_bin_file_means_the_same_as_safetensors(kit: Kit) -> None:
    assert_same(kit.load(kit.with_bin(kit.tensors)), kit.load())
    assert_same(kit.load(kit.with_bin({k: torch.nn.Parameter(v) for k, v in kit.tensors.items()})), kit.load())


@pytest.mark.parametrize("content", [[], 3, {"a": 3}, {3: torch.ones(1)}, {"a": {"b": torch.ones(1)}}])
def test_a_bin_file_of_other_things_is_refused(content: Any, kit: Kit) -> None:
    refuse(kit, kit.with_bin(content), r"adapter_model\.bin holds")


@pytest.mark.parametrize("tensor", [torch.ones(2, 2).to_sparse(), torch.ones(2, 2, dtype=torch.complex64)])
def test_a_bin_file_of_strange_tensors_is_refused(tensor: torch.Tensor, kit: Kit) -> None:
    refuse(kit, kit.with_bin(kit.tensors | {f"{Q0}.lora_A.weight": tensor}), "expected float32")


def test_a_bin_file_whose_tensors_are_larger_than_the_file_is_refused_although_their_shapes_fit(kit: Kit) -> None:
    one = torch.ones(1)
    tables = {"lora_embedding_A": one.expand(65536, 131), "lora_embedding_B": one.expand(64, 65536)}
    weights = kit.with_bin({f"base_model.model.model.embed_tokens.{name}": table for name, table in tables.items()})
    config = kit.with_config(target_modules=["embed_tokens"], r=65536)
    files = dataclasses.replace(weights, config_bytes=config.config_bytes)
    assert len(files.weights_bytes) < 2**16
    refuse(kit, files, r"tensors would take \d+: they share their storage")


def test_a_bin_file_with_a_tied_pair_of_tables_is_taken(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", vocab_size=2048, tie_word_embeddings=True)
    modules = ["embed_tokens", "lm_head"]
    adapter = make_adapter(tmp_path / "adapter", base, modules_to_save=modules, file_format="bin")
    file = adapter / "adapter_model.bin"
    tensors = torch.load(file)
    embedding, head = (f"base_model.model.{name}.weight" for name in ("model.embed_tokens", "lm_head"))
    tensors[head] = tensors[embedding]
    torch.save(tensors, file)
    assert file.stat().st_size < 2 * tensors[head].nbytes
    AdaptedDecoder(base).convert(adapter)


def test_a_compressed_bin_file_is_refused_unread(kit: Kit) -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(2**20)}, buffer)
    packed = io.BytesIO()
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert len(packed.getvalue()) < 2**16
    refuse(kit, AdapterFiles(kit.files.config_bytes, packed.getvalue(), "bin"), "is compressed")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_bin_files_are_refused_or_change_nothing_but_values(data: st.DataObject, kit: Kit) -> None:
    content = bytearray(kit.with_bin(kit.tensors).weights_bytes)
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    for _ in range(data.draw(st.integers(0, 3))):
        if content:
            # mostly the pickle at the start and the directory at the end
            position = data.draw(st.integers(0, min(4000, len(content) - 1)) | st.integers(0, len(content) - 1))
            content[position] = data.draw(st.integers(0, 255))
    try:
        weights = kit.load(AdapterFiles(kit.files.config_bytes, bytes(content), "bin"))
    except AdapterError:
        return
    assert weights.pages.shape == kit.load().pages.shape
    assert torch.isfinite(weights.pages).all()


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=64), weights_format=st.sampled_from(["safetensors", "bin"]))
def test_any_bytes_are_refused_with_a_message(content: bytes, weights_format: Any, kit: Kit) -> None:
    refuse(kit, AdapterFiles(kit.files.config_bytes, content, weights_format), ".")
