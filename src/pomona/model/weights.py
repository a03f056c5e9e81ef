"""A Hugging Face checkpoint's tensors -> DecoderWeights: verified, cast to the serving dtype, projections fused.

Reads safetensors (one file or shards) or, failing that, pytorch_model.bin without ever unpickling code. Each source
tensor is copied straight from the mapped file into its place, so that memory never holds the model twice (a .bin of
the old, unmappable kind costs its own size on top, one shard at a time). int8 weights are made of the serving dtype's,
one matrix after the other.
"""

import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

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

    @property
    def embed_weight(self) -> Tensor:
        """[vocab_size, hidden_size] as served: a copy if the backend has a layout of its own, float32 if quantized."""
        return unpack(self.embed)

    @property
    def lm_head_weight(self) -> Tensor:
        """[vocab_size, hidden_size] as served: a copy if the backend has a layout of its own, float32 if quantized."""
        return unpack(self.lm_head)

    def target_weight(self, layer: int, target: Target) -> Tensor:
        """One target's weight [out_features, in_features] as served: a view, or a copy if the backend has a layout of
        its own; float32 if quantized."""
        site, rows = _site_rows(self.spec, target)
        return unpack(self.layers[layer].sites[site])[rows]

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


def allocate_weights(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> DecoderWeights:
    """Weights of the right shapes with unspecified values, all in the dense layout."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def layer() -> LayerWeights:
        sites: dict[Site, PackedWeight] = {}
        biases: dict[Site, Tensor | None] = {}
        for site in Site:
            shapes = [spec.target_shape(target) for target in site.value]
            out_features = sum(out for _, out in shapes)
            sites[site] = dense(empty(out_features, shapes[0][0]))
            biases[site] = empty(out_features) if spec.has_bias(site.value[0]) else None
        norms = {name: empty(spec.hidden_size) for name in ("input_layernorm", "post_attention_layernorm")}
        if spec.has_qk_norm:
            norms |= {name: empty(spec.head_dim) for name in ("q_norm", "k_norm")}
        return LayerWeights(sites, biases, norms)

    embed = dense(empty(spec.vocab_size, spec.hidden_size))
    return DecoderWeights(
        spec=spec,
        embed=embed,
        layers=tuple(layer() for _ in range(spec.num_layers)),
        norm=empty(spec.hidden_size),
        lm_head=embed if spec.is_tied else dense(empty(spec.vocab_size, spec.hidden_size)),
    )


def pack_weights(weights: DecoderWeights, quantization: Quantization = Quantization.NONE) -> DecoderWeights:
    """Lay dense weights out for their device's backend, one matrix after the other, so that at most one exists twice.

    Args:
        weights: in the dense layout; not to be used afterwards.
        quantization: how to store them.
    """

    def packed(weight: Tensor) -> PackedWeight:
        return pack(quantize(weight) if quantization is Quantization.INT8 else weight)

    for layer in weights.layers:
        for site, weight in layer.sites.items():
            layer.sites[site] = packed(unpack(weight))
    if weights.spec.is_tied:
        table = packed(weights.embed_weight)
        return replace(weights, embed=table, lm_head=table)
    # Rows of an embedding of its own are only ever looked up.
    return replace(weights, lm_head=packed(weights.lm_head_weight))


def named_tensors(weights: DecoderWeights) -> Iterator[tuple[str, Tensor]]:
    """(name in a Hugging Face checkpoint, view of the tensor's place) for every tensor; a tied lm_head is left out."""
    yield _EMBED, weights.embed_weight
    if weights.lm_head is not weights.embed:
        yield _LM_HEAD, weights.lm_head_weight
    yield "model.norm.weight", weights.norm
    for index, layer in enumerate(weights.layers):
        prefix = f"model.layers.{index}"
        for target in Target:
            name = f"{prefix}.{TARGET_PARENTS[target]}.{TARGET_NAMES[target]}"
            yield f"{name}.weight", weights.target_weight(index, target)
            bias = weights.target_bias(index, target)
            if bias is not None:
                yield f"{name}.bias", bias
        for norm, weight in layer.norms.items():
            parent = "self_attn." if norm in ("q_norm", "k_norm") else ""
            yield f"{prefix}.{parent}{norm}.weight", weight


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
        dtype: the serving dtype, to which float32, float16 and bfloat16 sources are cast.
        device: where the weights go.
        progress: called with (bytes in place, bytes in total) after every tensor.
        quantization: how to store the matrices.

    Raises:
        CheckpointError: no weights, an unreadable file, or a missing, unexpected or wrongly shaped tensor; nothing has
            been allocated for the model unless a file breaks half-way, or holds what ``dtype`` cannot.
    """
    files = find_files(folder)
    found = {path: describe_tensors(path) for path in files}
    on_meta = allocate_weights(spec, dtype, torch.device("meta"))
    expected = {name: tuple(place.shape) for name, place in named_tensors(on_meta)}
    has_spare_head = _check(folder, found, expected, is_tied=spec.is_tied)
    weights = allocate_weights(spec, dtype, device)
    places = dict(named_tensors(weights))
    total = sum(place.numel() * place.element_size() for place in places.values())
    done = 0
    with torch.no_grad():
        for path in files:
            wanted = [name for name in found[path] if name in places]
            for name, source in read_tensors(path, wanted):
                place = places[name]
                place.copy_(source)
                if dtype is torch.float16 and source.dtype is not dtype:
                    _check_finite(path, name, place)
                done += place.numel() * place.element_size()
                if progress is not None:
                    progress(done, total)
        if has_spare_head:
            _check_spare_head(found, weights.embed_weight)
        return pack_weights(weights, quantization)


def _check_finite(path: Path, name: str, place: Tensor) -> None:
    """float16 holds less than the others: one infinity in a weight, and no logit is a number."""
    if not all(torch.isfinite(extreme) for extreme in place.aminmax()):
        raise CheckpointError(f"{path}: tensor {name} is not finite in float16: choose another dtype")


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


def _check_spare_head(found: dict[Path, dict[str, TensorInfo]], embed: Tensor) -> None:
    """A tied checkpoint may store lm_head as well, if it is the same."""
    for path, tensors in found.items():
        if _LM_HEAD not in tensors:
            continue
        for _, source in read_tensors(path, [_LM_HEAD]):
            if not torch.equal(source.to(embed), embed):
                raise CheckpointError(
                    f"{path}: tensor {_LM_HEAD} differs from {_EMBED}, but config.json has tie_word_embeddings: true"
                )
