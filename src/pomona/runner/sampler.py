"""From logits to the next token of every sampled row, all rows at once.

A row's result depends on its own logits, parameters and tokens only. Its random draws come from its own stream: draw
number i is a hash of (seed, i), so the batch it shares never changes them.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pomona.core.plan import TokenLogprobs
from pomona.core.request import MAX_LOGPROBS, SamplingParams
from pomona.kernels.copies import Download, upload
from pomona.kernels.sample import greedy
from pomona.runner.sequences import SequenceTable

PROMPT_LOGITS_ROWS = 256
"""Prompt positions whose logits are held at once: bounds memory at this many rows of the vocabulary."""
DRAW_BYTES = 64
"""Memory that drawing takes for each probability of the rows that are drawn at once, what sorting takes included."""
_MOST_DRAWN = 2**23
"""Probabilities of the rows that are drawn at once: bounds that memory."""


@dataclass(frozen=True)
class Sampled:
    """Next tokens of the sampled rows, on the host."""

    token_ids: NDArray[np.int64]
    """[num_rows]."""
    is_finite: NDArray[np.bool_]
    """[num_rows]; False where the logits were not finite, so that the token means nothing."""
    logprobs: dict[int, TokenLogprobs]
    """By row, for those that asked."""


@dataclass(frozen=True)
class Choice:
    """Next tokens of the sampled rows, on the device."""

    token_ids: Tensor
    """int64 [num_rows]."""
    download: Download
    """token_ids; whether each row's logits were finite, bool [num_rows]; what ``_find`` found for rows that asked."""
    asked: dict[int, int]
    """By row, for those that asked for log-probabilities: the number of likeliest tokens."""

    def sampled(self) -> Sampled:
        """Wait for the tokens, and for nothing that the device is asked for only now: the next step comes before it."""
        arrays = self.download.arrays()
        token_ids, is_finite = cast(tuple[NDArray[np.int64], NDArray[np.bool_]], arrays[:2])
        logprobs: dict[int, TokenLogprobs] = {}
        if self.asked:
            told = _told(token_ids[list(self.asked)], arrays[2:], self.asked.values())
            logprobs = {i: entry for i, entry in zip(self.asked, told, strict=True) if is_finite[i]}
        return Sampled(token_ids, is_finite, logprobs)


def choose(logits: Tensor, rows: NDArray[np.int64], table: SequenceTable) -> Choice:
    """Choose the next token of every row, without waiting for the device.

    Args:
        logits: float32 [num_rows, vocab_size]; changed in place.
        rows: [num_rows], the sequences' rows in the table.
        table: sampling parameters and tokens so far.
    """
    token_ids, is_finite = greedy(logits)
    special = np.flatnonzero(~table.is_plain[rows])
    wanted = ((int(i), _params(table, rows[i]).logprobs) for i in special)
    asked = {i: num_top for i, num_top in wanted if num_top is not None}
    asking = np.array(list(asked), dtype=np.int64)  # log-probabilities are of the logits before they are edited
    logprobs = torch.log_softmax(logits[upload(asking, logits.device)], dim=-1) if asked else None
    for i in special:
        _edit(logits[int(i)], int(rows[i]), table)
    if special.size:
        edited = upload(special, logits.device)
        token_ids[edited] = greedy(logits[edited])[0]
    random = np.flatnonzero(table.temperature[rows] > 0)
    num_at_once = rows_at_once(logits.shape[1])
    for first in range(0, random.size, num_at_once):
        some = random[first : first + num_at_once]
        drawn = upload(some, logits.device)
        token_ids[drawn] = _draw(logits[drawn], rows[some], table)
    found: tuple[Tensor, ...] = ()
    if logprobs is not None:
        # As many for all: which of equal ones are found must not depend on how many others ask for.
        num_top = MAX_LOGPROBS if any(asked.values()) else 0
        found = _find(logprobs, token_ids[upload(asking, logits.device)], num_top)
    return Choice(token_ids, Download.of(token_ids, is_finite, *found), asked)


def rows_at_once(vocab_size: int) -> int:
    """Rows whose tokens are drawn at once."""
    return max(1, _MOST_DRAWN // vocab_size)


def _params(table: SequenceTable, row: int) -> SamplingParams:
    params = table.sampling[row]
    assert params is not None, "sampled row has no sequence"
    return params


def _edit(logits: Tensor, row: int, table: SequenceTable) -> None:
    """Apply penalties, bias and min_tokens to one row's logits [vocab_size], in place."""
    params = _params(table, row)
    num_tokens, num_prompt = int(table.num_tokens[row]), int(table.num_prompt_tokens[row])
    tokens = table.token_ids[row, : num_tokens if params.has_penalties else 0]
    assert len(tokens) <= table.num_host_tokens[row], "penalties need all of the sequence's tokens on the host"
    if params.repetition_penalty != 1.0:
        seen = upload(np.unique(tokens), logits.device)
        values = logits[seen]
        scaled = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
        logits[seen] = scaled
    if (params.presence_penalty or params.frequency_penalty) and num_tokens > num_prompt:
        unique, counts = np.unique(tokens[num_prompt:], return_counts=True)
        output, counted = upload(unique, logits.device), upload(counts, logits.device).to(logits.dtype)
        logits[output] -= params.presence_penalty + params.frequency_penalty * counted
    if params.logit_bias:
        token_ids, biases = zip(*params.logit_bias, strict=True)
        index = upload(np.array(token_ids, dtype=np.int64), logits.device)
        logits.index_add_(0, index, upload(np.array(biases, dtype=np.float32), logits.device))
    if num_tokens - num_prompt < params.min_tokens and params.stop_token_ids:
        stop_ids = upload(np.array(params.stop_token_ids, dtype=np.int64), logits.device)
        logits.index_fill_(0, stop_ids, -torch.inf)


def _draw(logits: Tensor, rows: NDArray[np.int64], table: SequenceTable) -> Tensor:
    """Inverse-CDF sampling: the first token whose cumulative probability exceeds the row's uniform number.

    Filters apply in the order temperature, top_k, top_p (over what top_k left), min_p, as in transformers.
    """

    def column(values: NDArray[np.generic]) -> Tensor:
        return upload(values[rows], logits.device).unsqueeze(1)

    probs = torch.softmax(logits / column(table.temperature), dim=-1)
    vocab_size = probs.shape[1]
    is_filtered = ((table.top_k[rows] > 0) & (table.top_k[rows] < vocab_size)) | (table.top_p[rows] < 1.0)
    filtered = np.flatnonzero(is_filtered)
    if filtered.size:
        index = upload(filtered, logits.device)
        top_k = np.where(table.top_k[rows[filtered]] > 0, table.top_k[rows[filtered]], vocab_size)
        probs[index] = _keep_top(
            probs[index],
            upload(top_k, logits.device).unsqueeze(1),
            upload(table.top_p[rows[filtered]], logits.device).unsqueeze(1),
        )
    if (table.min_p[rows] > 0).any():
        floor = probs.amax(dim=1, keepdim=True) * column(table.min_p)
        probs = probs.masked_fill(probs < floor, 0.0)
    cdf = probs.to(torch.float64).cumsum(dim=1)
    draws = uniform(table.seed[rows], (table.num_tokens[rows] - table.num_prompt_tokens[rows]).astype(np.uint64))
    threshold = upload(draws, logits.device).unsqueeze(1) * cdf[:, -1:]
    # right=True skips tokens of probability zero. The clamp only matters for rows that are not finite.
    return torch.searchsorted(cdf, threshold, right=True).squeeze(1).clamp_(max=vocab_size - 1)


def _keep_top(probs: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Zero all but the top_k most likely tokens, then all but the smallest set of those that reaches top_p."""
    ordered, order = probs.sort(dim=1, descending=True, stable=True)
    ordered = ordered.masked_fill(torch.arange(probs.shape[1], device=probs.device) >= top_k, 0.0)
    # Not torch's sum: how that adds up a row depends on how many rows there are.
    cumulative = ordered.cumsum(dim=1)
    is_past = cumulative - ordered >= top_p * cumulative[:, -1:]  # what is more likely suffices already
    is_past[:, 0] = False  # the most likely token stays, also where top_p is 0 in float32
    ordered = ordered.masked_fill(is_past, 0.0)
    return torch.zeros_like(probs).scatter_(1, order, ordered)


def uniform(seeds: NDArray[np.uint64], indices: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Number ``indices[i]`` of the random stream ``seeds[i]``, in [0, 1) with 53 random bits.

    Two rounds of the SplitMix64 finaliser (Steele, Lea, Flood, OOPSLA 2014) over seed and index.
    """
    with np.errstate(over="ignore"):
        mixed = _splitmix64(_splitmix64(seeds) ^ (indices * np.uint64(0xD1B54A32D192ED03)))
    result: NDArray[np.float64] = (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return result


def _splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    result: NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return result


def token_logprobs(logits: Tensor, token_ids: NDArray[np.int64], num_top: int) -> tuple[TokenLogprobs, ...]:
    """Log-probability and rank of a token per row, and the most likely ones. Waits for the device once.

    Args:
        logits: [num_rows, vocab_size], raw.
        token_ids: [num_rows].
        num_top: number of most likely tokens.
    """
    found = _find(torch.log_softmax(logits, dim=-1), upload(token_ids, logits.device), num_top)
    return tuple(_told(token_ids, Download.of(*found).arrays(), [num_top] * len(token_ids)))


def _find(logprobs: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, ...]:
    """From log-probabilities [num_rows, vocab_size]: those of a token per row and these tokens' ranks [num_rows], the
    largest ones and whose they are [num_rows, num_top]."""
    own = logprobs.gather(1, token_ids.unsqueeze(1))
    top = logprobs.topk(min(num_top, logprobs.shape[1]))
    return own.squeeze(1), (logprobs > own).sum(1) + 1, top.values, top.indices


def _told(
    token_ids: NDArray[np.int64], found: Sequence[NDArray[np.generic]], num_tops: Iterable[int]
) -> Iterator[TokenLogprobs]:
    """What ``_find`` found for each row, of its most likely tokens as many as the row asked for."""
    own, ranks, values, ids = (array.tolist() for array in found)
    for i, num_top in enumerate(num_tops):
        top = tuple(zip(ids[i][:num_top], values[i][:num_top], strict=True))
        yield TokenLogprobs(token_id=int(token_ids[i]), logprob=own[i], rank=ranks[i], top=top)
