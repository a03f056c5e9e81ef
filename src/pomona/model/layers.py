"""One decoder layer: attention, MLP, and the two norms, with the places where adapters come in.

Every function takes ``lora``, the step's adapters, or None when no row has one. Rows are tokens of any sequences.
"""

from dataclasses import dataclass

from torch import Tensor

from pomona.kernels.activation import silu_mul
from pomona.kernels.attention import AttentionBatch, paged_attention, write_kv
from pomona.kernels.linear import packed_linear
from pomona.kernels.norm import add_rms_norm, rms_norm
from pomona.kernels.rope import apply_rope
from pomona.model import lora as adapters
from pomona.model.lora import LoraState
from pomona.model.spec import ModelSpec, Site
from pomona.model.weights import DecoderWeights


@dataclass(frozen=True, slots=True)
class StepContext:
    """What all layers of one forward pass share."""

    spec: ModelSpec
    weights: DecoderWeights
    positions: Tensor
    """int64 [num_tokens]."""
    cos_sin: Tensor
    """float32 [num_positions, head_dim]."""
    attention: AttentionBatch
    lora: LoraState | None


def project(x: Tensor, layer: int, site: Site, context: StepContext) -> Tensor:
    """The fused products of a site, adapters included.

    Args:
        x: [num_tokens, in_features].
        layer: which layer's weights.
        site: which product.
        context: the step.

    Returns:
        [num_tokens, sum of the site's out_features].
    """
    weights = context.weights.layers[layer]
    bias = weights.biases[site]
    lora = context.lora
    if lora is None:
        return packed_linear(x, weights.sites[site], bias)
    out = adapters.project(x, weights.sites[site], bias, layer, site, lora)
    adapters.adapt(out, x, layer, site, lora, bias)
    return out


def layer_norm(
    x: Tensor, residual: Tensor | None, layer: int, name: str, context: StepContext
) -> tuple[Tensor, Tensor]:
    """Add a block's output to the residual stream and normalize it; the first norm of all has nothing to add to.

    Args:
        x: [num_tokens, hidden_size].
        residual: like x, or None.
        layer: which layer; -1 with name "norm" is the final norm.
        name: input_layernorm, post_attention_layernorm or norm.
        context: the step.

    Returns:
        (normed, residual stream), both like x.
    """
    eps = context.spec.rms_norm_eps
    weight = context.weights.norm_weight(layer, name)
    if residual is None:
        normed, residual = rms_norm(x, weight, eps), x
    else:
        normed, residual = add_rms_norm(x, residual, weight, eps)
    if context.lora is not None:
        normed = adapters.adapt_norm(residual, normed, layer, name, context.lora, eps)
    return normed, residual


def _head_norm(heads: Tensor, layer: int, name: str, context: StepContext) -> Tensor:
    """Qwen3's norm over each head: [num_tokens, num_heads, head_dim] -> the same."""
    eps = context.spec.rms_norm_eps
    normed = rms_norm(heads, context.weights.norm_weight(layer, name), eps)
    if context.lora is not None:
        normed = adapters.adapt_norm(heads, normed, layer, name, context.lora, eps)
    return normed


def attend(x: Tensor, layer: int, kv_cache: tuple[Tensor, Tensor], context: StepContext) -> Tensor:
    """Self-attention of one layer: write this step's keys and values, then read the sequences' whole contexts.

    Args:
        x: [num_tokens, hidden_size], normalized.
        layer: which layer.
        kv_cache: this layer's (keys, values), changed in place.
        context: the step.

    Returns:
        [num_tokens, hidden_size].
    """
    spec = context.spec
    qkv = project(x, layer, Site.QKV, context)
    heads = qkv.view(qkv.shape[0], -1, spec.head_dim)
    query, key = heads[:, : spec.num_heads], heads[:, spec.num_heads : spec.num_heads + spec.num_kv_heads]
    value = heads[:, spec.num_heads + spec.num_kv_heads :]
    if spec.has_qk_norm:
        query = _head_norm(query, layer, "q_norm", context)
        key = _head_norm(key, layer, "k_norm", context)
    apply_rope(query, key, context.positions, context.cos_sin)
    write_kv(key, value, *kv_cache, context.attention.slot_mapping)
    attended = paged_attention(
        query,
        *kv_cache,
        context.attention,
        scale=spec.head_dim**-0.5,
        sliding_window=spec.sliding_windows[layer],
    )
    return project(attended.flatten(1), layer, Site.O, context)


def feed_forward(x: Tensor, layer: int, context: StepContext) -> Tensor:
    """The MLP of one layer, [num_tokens, hidden_size] -> the same."""
    return project(silu_mul(project(x, layer, Site.GATE_UP, context)), layer, Site.DOWN, context)
