"""The network: token ids in, final hidden states and logits out, for a batch of rows of any sequences and adapters.

Base weights are read once per step whatever the adapters. The caller wraps calls in ``torch.inference_mode()``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pomona.kernels.attention import AttentionBatch
from pomona.kernels.linear import gather_rows, packed_linear
from pomona.model import lora as adapters
from pomona.model.layers import StepContext, attend, feed_forward, layer_norm
from pomona.model.lora import LoraState
from pomona.model.rope import cos_sin_table
from pomona.model.spec import ModelSpec
from pomona.model.weights import DecoderWeights


class Decoder:
    """A Llama-like decoder over a paged KV cache.

    Args:
        spec: its dimensions.
        weights: on the device where it shall run.
        max_positions: positions the rotary table covers; None takes the model's ``max_position_embeddings``.
    """

    def __init__(self, spec: ModelSpec, weights: DecoderWeights, max_positions: int | None = None) -> None:
        num_positions = spec.max_position_embeddings if max_positions is None else max_positions
        assert 1 <= num_positions <= spec.max_position_embeddings
        self.spec = spec
        self.weights = weights
        self._cos_sin = cos_sin_table(spec.rope, spec.head_dim, num_positions, weights.device)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        kv_cache: Sequence[tuple[Tensor, Tensor]],
        attention: AttentionBatch,
        lora: LoraState | None,
    ) -> Tensor:
        """Compute one step's rows and write their keys and values.

        Args:
            token_ids: int64 [num_tokens].
            positions: int64 [num_tokens], each below ``max_positions``.
            kv_cache: (keys, values) of every layer, each [num_blocks, block_size, num_kv_heads, head_dim], changed in
                place.
            attention: which rows belong to which sequence, and where its blocks are.
            lora: the rows' adapters; None if no row has one.

        Returns:
            [num_tokens, hidden_size] after the final norm, in the serving dtype.
        """
        context = StepContext(self.spec, self.weights, positions, self._cos_sin, attention, lora)
        hidden = gather_rows(self.weights.embed, token_ids)
        if lora is not None:
            adapters.adapt_embeddings(hidden, token_ids, lora)
        residual: Tensor | None = None
        for layer in range(self.spec.num_layers):
            normed, residual = layer_norm(hidden, residual, layer, "input_layernorm", context)
            hidden = attend(normed, layer, kv_cache[layer], context)
            normed, residual = layer_norm(hidden, residual, layer, "post_attention_layernorm", context)
            hidden = feed_forward(normed, layer, context)
        normed, _ = layer_norm(hidden, residual, -1, "norm", context)
        return normed

    def logits(self, hidden_rows: Tensor, lora: LoraState | None) -> Tensor:
        """Scores of every token of the vocabulary.

        Args:
            hidden_rows: [num_rows, hidden_size], rows of ``forward``'s result.
            lora: its ``logit_extras`` name rows of ``hidden_rows``.

        Returns:
            float32 [num_rows, vocab_size].
        """
        logits = packed_linear(hidden_rows, self.weights.lm_head, out_dtype=torch.float32)
        return logits if lora is None else adapters.adapt_logits(logits, hidden_rows, lora)
