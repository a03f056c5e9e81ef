"""A Hugging Face checkpoint's tensors -> DecoderWeights: verified, cast to the serving dtype, projections fused.

Reads safetensors (one file or shards) or, failing that, pytorch_model.bin without ever unpickling code. Each source
tensor is copied straight from the mapped file into its place, and a matrix is laid out, or made int8, as soon as its
tensors are there: memory holds the model as it is served and a matrix besides (a .bin of the old, unmappable kind costs
its own size on top, one shard at a time).
"""

import enum
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pomona.core.errors import CheckpointError
from pomona.kernels.linear import PackedWeight, dense, pack, quantize, unpack
from pomona.model.checkpoint_files import TensorInfo, describe_tensors, find_files, read_tensors
from pomona.model.spec import TARGET_NAMES, TARGET_PARENTS, ModelSpec, Site, Target

_EMBED = "model.embed_tokens.weight"
_LM_HEAD = "lm_head.weight"
_FLOAT_DTYPES = ("float32", "float16", "bfloat16", "float64")


class Quantization(enum.StrEnum):
    """How matrices are stored: projections, lm_head, and with it a tied embedding.

    Biases, norms and an embedding of its own, whose rows are only looked up, always keep the serving dtype.
    """

    NONE = "none"
    """In the serving dtype."""
    INT8 = "int8"
    """A byte per weight and a scale per output, made when the checkpoint is loaded."""


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer. Products of one ``Site`` are fused: rows of its targets one after the other."""

    sites: dict[Site, PackedWeight]
    """[sum of out_features, in_features] each."""
    biases: dict[Site, Tensor | None]
    """[sum of out_features]."""
    norms: dict[str, Tensor]
    """input_layernorm and post_attention_layernorm [hidden_size]; with qk-norm also q_norm and k_norm [head_dim]."""


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """The base model, on one device, in the serving dtype."""

    spec: ModelSpec
    embed: PackedWeight
    """[vocab_size, hidden_size]."""
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    """[hidden_size]: the final norm."""
    lm_head: PackedWeight
    """[vocab_size, hidden_size]; the very object of ``embed`` if the model is tied."""

    @property
    def dtype(self) -> torch.dtype:
        """The serving dtype."""
        return self.embed.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.norm.device

    def target_weight(self, layer: int, target: Target, rows: slice = slice(None)) -> Tensor:
        """One target's weight [out_features, in_features] as served, or consecutive rows of it: a view, or a copy if
        the backend has a layout of its own; float32 if quantized."""
        site, of_target = _site_rows(self.spec, target)
        start, stop, _ = rows.indices(of_target.stop - of_target.start)
        return unpack(self.layers[layer].sites[site], slice(of_target.start + start, of_target.start + stop))

    def target_bias(self, layer: int, target: Target) -> Tensor | None:
        """One target's bias [out_features], a view, or None."""
        site, rows = _site_rows(self.spec, target)
        bias = self.layers[layer].biases[site]
        return None if bias is None else bias[rows]

    def norm_weight(self, layer: int, name: str) -> Tensor:
        """A norm's weight by attribute name; layer -1 is the final norm."""
        return self.norm if layer == -1 else self.layers[layer].norms[name]

    @property
    def num_bytes(self) -> int:
        """Memory of all weights; a tied lm_head counts once."""
        packed = [self.embed] + ([] if self.lm_head is self.embed else [self.lm_head])
        tensors = [self.norm]
        for layer in self.layers:
            packed += layer.sites.values()
            tensors += layer.norms.values()
            tensors += [bias for bias in layer.biases.values() if bias is not None]
        return sum(weight.num_bytes for weight in packed) + sum(
            tensor.numel() * tensor.element_size() for tensor in tensors
        )


def _site_rows(spec: ModelSpec, target: Target) -> tuple[Site, slice]:
    """The site of a target, and the target's rows in the fused weight."""
    for site in Site:
        start = 0
        for member in site.value:
            end = start + spec.target_shape(member)[1]
            if member is target:
                return site, slice(start, end)
            start = end
    raise AssertionError(target)


def _allocate(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> DecoderWeights:
    """Weights of the right shapes with unspecified values; matrices are on the meta device until they are read."""

    def empty(size: int) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    def matrix(out_features: int, in_features: int) -> PackedWeight:
        return dense(torch.empty((out_features, in_features), dtype=dtype, device="meta"))

    def layer() -> LayerWeights:
        sites: dict[Site, PackedWeight] = {}
        biases: dict[Site, Tensor | None] = {}
        for site in Site:
            shapes = [spec.target_shape(target) for target in site.value]
            out_features = sum(out for _, out in shapes)
            sites[site] = matrix(out_features, shapes[0][0])
            biases[site] = empty(out_features) if spec.has_bias(site.value[0]) else None
        norms = {name: empty(spec.hidden_size) for name in ("input_layernorm", "post_attention_layernorm")}
        if spec.has_qk_norm:
            norms |= {name: empty(spec.head_dim) for name in ("q_norm", "k_norm")}
        return LayerWeights(sites, biases, norms)

    embed = matrix(spec.vocab_size, spec.hidden_size)
    return DecoderWeights(
        spec=spec,
        embed=embed,
        layers=tuple(layer() for _ in range(spec.num_layers)),
        norm=empty(spec.hidden_size),
        lm_head=embed if spec.is_tied else matrix(spec.vocab_size, spec.hidden_size),
    )


@dataclass(slots=True)
class _Matrix:
    """A matrix on its way to ``holder[key]``: on the meta device, then dense while its tensors come, then laid out."""

    holder: dict[Any, PackedWeight]
    key: Any
    missing: dict[str, slice]
    """Its rows by the name of the tensor that fills them."""
    lay_out: Callable[[Tensor], PackedWeight]
    """Makes of the dense matrix what is served."""

    def rows(self, name: str) -> Tensor:
        """Where a tensor is to be copied."""
        return self.holder[self.key].data[self.missing[name]]

    def fill(self, name: str, source: Tensor, device: torch.device) -> None:
        """Copy a tensor; with the last one the matrix is laid out."""
        if self.rows(name).is_meta:
            self.holder[self.key] = dense(torch.empty_like(self.holder[self.key].data, device=device))
        self.rows(name).copy_(source)
        del self.missing[name]
        if not self.missing:
            self.holder[self.key] = self.lay_out(self.holder[self.key].data)


def _vectors(weights: DecoderWeights) -> Iterator[tuple[str, Tensor]]:
    """(name in a Hugging Face checkpoint, view of the tensor's place) for every norm and bias."""
    yield "model.norm.weight", weights.norm
    for index, layer in enumerate(weights.layers):
        for target in Target:
            bias = weights.target_bias(index, target)
            if bias is not None:
                yield f"{_target_name(index, target)}.bias", bias
        for norm, weight in layer.norms.items():
            parent = "self_attn." if norm in ("q_norm", "k_norm") else ""
            yield f"model.layers.{index}.{parent}{norm}.weight", weight


def _matrices(
    weights: DecoderWeights, tables: dict[str, PackedWeight], quantization: Quantization
) -> Iterator[tuple[str, _Matrix]]:
    """(name in a Hugging Face checkpoint, the matrix that it is part of) for every projection and table.

    Args:
        weights: as allocated.
        tables: the embedding and, unless it is tied, lm_head, by name.
        quantization: how to store them.
    """

    def packed(weight: Tensor) -> PackedWeight:
        return pack(quantize(weight) if quantization is Quantization.INT8 else weight)

    for name in tables:
        # Rows of an embedding of its own are only ever looked up.
        is_looked_up = name == _EMBED and _LM_HEAD in tables
        yield name, _Matrix(tables, name, {name: slice(None)}, dense if is_looked_up else packed)
    for index, layer in enumerate(weights.layers):
        for site in Site:
            rows = {
                f"{_target_name(index, target)}.weight": _site_rows(weights.spec, target)[1] for target in site.value
            }
            matrix = _Matrix(layer.sites, site, rows, packed)
            yield from [(name, matrix) for name in rows]


def _target_name(layer: int, target: Target) -> str:
    return f"model.layers.{layer}.{TARGET_PARENTS[target]}.{TARGET_NAMES[target]}"


def load_weights(
    folder: Path,
    spec: ModelSpec,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
    quantization: Quantization = Quantization.NONE,
) -> DecoderWeights:
    """Read a checkpoint.

    Args:
        folder: holds model.safetensors, or its shards and index, or pytorch_model.bin, or its shards and index.
        spec: what config.json promises.
        dtype: the serving dtype, to which float32, float16, bfloat16 and float64 sources are cast.
        device: where the weights go.
        progress: called with (bytes in place, bytes in total) after every tensor.
        quantization: how to store the matrices.

    Raises:
        CheckpointError: no weights, an unreadable file, or a missing, unexpected or wrongly shaped tensor; nothing has
            been allocated for the model unless a file breaks half-way, or holds what ``dtype`` cannot.
    """
    files = find_files(folder)
    found = {path: describe_tensors(path) for path in files}
    weights = _allocate(spec, dtype, device)
    tables = {_EMBED: weights.embed} if spec.is_tied else {_EMBED: weights.embed, _LM_HEAD: weights.lm_head}
    matrices = dict(_matrices(weights, tables, quantization))
    vectors = dict(_vectors(weights))
    expected = {name: tuple(matrix.rows(name).shape) for name, matrix in matrices.items()}
    expected |= {name: tuple(vector.shape) for name, vector in vectors.items()}
    if _check(folder, found, expected, is_tied=spec.is_tied):
        _check_spare_head(found, dtype)
    total = sum(math.prod(shape) for shape in expected.values()) * dtype.itemsize
    done = 0
    with torch.no_grad():
        for path in files:
            for name, source in read_tensors(path, [name for name in found[path] if name in expected]):
                if source.dtype is torch.float64 or (dtype is torch.float16 and source.dtype is not dtype):
                    _check_finite(path, name, source, dtype)
                if name in matrices:
                    matrices[name].fill(name, source, device)
                else:
                    vectors[name].copy_(source)
                done += source.numel() * dtype.itemsize
                if progress is not None:
                    progress(done, total)
    return replace(weights, embed=tables[_EMBED], lm_head=tables.get(_LM_HEAD, tables[_EMBED]))


def _check_finite(path: Path, name: str, source: Tensor, dtype: torch.dtype) -> None:
    """float16 holds less than the others, float64 more: one infinity in a weight, and no logit is a number."""
    if not all(torch.isfinite(extreme.to(dtype)) for extreme in source.aminmax()):
        dtype_name = str(dtype).removeprefix("torch.")
        raise CheckpointError(f"{path}: tensor {name} is not finite in {dtype_name}: choose another dtype")


def _check(
    folder: Path, found: dict[Path, dict[str, TensorInfo]], expected: dict[str, tuple[int, ...]], *, is_tied: bool
) -> bool:
    """Compare what the files hold with what the spec expects. True if a tied model's lm_head is stored too."""
    where: dict[str, Path] = {}
    unexpected: list[str] = []
    has_spare_head = False
    for path, tensors in found.items():
        for name, (shape, dtype) in tensors.items():
            if name.endswith("rotary_emb.inv_freq"):
                continue
            if name in where:
                raise CheckpointError(f"{path}: tensor {name} is in {where[name].name} too")
            where[name] = path
            is_spare_head = is_tied and name == _LM_HEAD
            has_spare_head |= is_spare_head
            wanted = expected.get(_EMBED if is_spare_head else name)
            if wanted is None:
                unexpected.append(name)
                continue
            if shape != wanted:
                raise CheckpointError(f"{path}: tensor {name} has shape {list(shape)}, expected {list(wanted)}")
            if dtype not in _FLOAT_DTYPES:
                raise CheckpointError(f"{path}: tensor {name} is {dtype}: quantized checkpoints are not supported")
    if unexpected:
        raise CheckpointError(f"{folder}: the model has no place for tensor {_listed(sorted(unexpected))}")
    missing = [name for name in expected if name not in where]
    if missing:
        name = missing[0]
        raise CheckpointError(f"{folder}: tensor {_listed(missing)} is missing, expected shape {list(expected[name])}")
    return has_spare_head


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"


def _check_spare_head(found: dict[Path, dict[str, TensorInfo]], dtype: torch.dtype) -> None:
    """A tied checkpoint may store lm_head as well, if it is the same."""
    tied: dict[str, tuple[Path, Tensor]] = {}
    for path, tensors in found.items():
        names = [name for name in (_EMBED, _LM_HEAD) if name in tensors]
        tied |= {name: (path, source) for name, source in read_tensors(path, names)}
    path, head = tied[_LM_HEAD]
    if not torch.equal(head.to(dtype), tied[_EMBED][1].to(dtype)):
        raise CheckpointError(
            f"{path}: tensor {_LM_HEAD} differs from {_EMBED}, but config.json has tie_word_embeddings: true"
        )
