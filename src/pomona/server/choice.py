"""One choice of a request: the engine's tokens turned into text, log-probabilities and a finish reason.

Streaming and non-streaming answers are both made of the pieces that this yields, so they cannot differ.
"""

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from pomona.core.output import RequestOutput
from pomona.core.plan import TokenLogprobs
from pomona.core.request import FinishReason
from pomona.text.detokenizer import Detokenizer
from pomona.text.stop import StopMatcher, StopStrings
from pomona.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TextRules:
    """How a request wants its text."""

    stops: StopStrings | None = None
    include_stop: bool = False
    skip_special_tokens: bool = True
    is_continuation: bool = False
    """The text goes on from the prompt, so that a leading space is a part of it."""
    min_tokens: int = 0
    """Stop strings are not looked for before this many output tokens."""
    has_logprobs: bool = False
    hides_output: bool = False
    """Only the prompt was asked for (``max_tokens`` 0 with ``echo``): drop the one token that the engine must make."""


@dataclass(frozen=True, slots=True)
class PositionedLogprobs:
    """Log-probabilities of one token, and where its text begins."""

    text_offset: int
    """Characters of the choice's text before it."""
    values: TokenLogprobs | None
    """None for the first token of a prompt, which nothing predicts."""
    token_id: int


@dataclass(slots=True)
class Piece:
    """What one output of the engine adds to a choice."""

    text: str = ""
    logprobs: list[PositionedLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    @property
    def is_empty(self) -> bool:
        """True if there is nothing to tell the client."""
        return not self.text and not self.logprobs and self.finish_reason is None

    def extend(self, later: "Piece") -> None:
        """Add the next piece of the same choice."""
        self.text += later.text
        self.logprobs.extend(later.logprobs)
        self.finish_reason = later.finish_reason
        self.stop_reason = later.stop_reason


class Choice:
    """Progress of one choice.

    Args:
        tokenizer: the model's.
        rules: what the request asked for.
        eos_token_ids: the model's own ends of sequence, which are no ``stop_reason``.
        text_offset: characters of the choice's text before its first output token (an echoed prompt).
    """

    __slots__ = (
        "_detokenizer", "_eos_token_ids", "_matcher", "_num_chars", "_num_chars_given", "_rules", "_waiting_logprobs",
        "num_cached_tokens", "num_output_tokens",
    )  # fmt: skip

    def __init__(
        self, tokenizer: Tokenizer, rules: TextRules, eos_token_ids: Sequence[int], text_offset: int = 0
    ) -> None:
        self._rules = rules
        self._eos_token_ids = frozenset(eos_token_ids)
        self._detokenizer = Detokenizer(
            tokenizer, skip_special_tokens=rules.skip_special_tokens, is_continuation=rules.is_continuation
        )
        self._matcher = None if rules.stops is None else StopMatcher(rules.stops, include_stop=rules.include_stop)
        self._num_chars = text_offset
        self._num_chars_given = text_offset
        self._waiting_logprobs: deque[PositionedLogprobs] = deque()
        self.num_output_tokens = 0
        """Tokens that count as usage: up to the one that completed a stop string, stop token included."""
        self.num_cached_tokens = 0

    def advance(self, output: RequestOutput) -> Piece:
        """Take one output of the engine. After a piece with a finish reason, none may follow.

        A stop string is only seen here: the piece then has a finish reason although the output has none, and the
        caller must end the engine's request.
        """
        self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        if self._rules.hides_output:
            return Piece(finish_reason=output.finish_reason and FinishReason.LENGTH)
        texts: list[str] = []
        is_stop_hidden = output.stop_token_id is not None and not self._rules.include_stop
        for position, token_id in enumerate(output.new_token_ids):
            self.num_output_tokens += 1
            if is_stop_hidden and position == len(output.new_token_ids) - 1:
                break
            if self._rules.has_logprobs:
                values = output.logprobs[position]
                self._waiting_logprobs.append(PositionedLogprobs(self._num_chars, values, token_id))
            text = self._detokenizer.push(token_id)
            self._num_chars += len(text)
            if self._matcher is None:
                texts.append(text)
                continue
            texts.append(self._pass(text))
            if self._matcher.matched is not None:
                return self._finish(texts, FinishReason.STOP, self._matcher.matched)
        if output.finish_reason is None:
            return self._give("".join(texts))
        texts.append(self._pass(self._detokenizer.flush()))
        if self._matcher is not None:
            if self._matcher.matched is not None:
                return self._finish(texts, FinishReason.STOP, self._matcher.matched)
            texts.append(self._matcher.flush())
        is_own_end = output.stop_token_id in self._eos_token_ids
        return self._finish(texts, output.finish_reason, None if is_own_end else output.stop_token_id)

    def _pass(self, text: str) -> str:
        """Let text through the stop strings."""
        if self._matcher is None or self.num_output_tokens < self._rules.min_tokens:
            return text
        return self._matcher.push(text)

    def _give(self, text: str) -> Piece:
        """Hand out text, and the log-probabilities of the tokens that have a character in it or before it."""
        self._num_chars_given += len(text)
        waiting = self._waiting_logprobs
        logprobs = []
        while waiting and waiting[0].text_offset < self._num_chars_given:
            logprobs.append(waiting.popleft())
        return Piece(text, logprobs)

    def _finish(self, texts: Sequence[str], reason: FinishReason, stop_reason: str | int | None) -> Piece:
        is_cut = self._matcher is not None and self._matcher.matched is not None and not self._rules.include_stop
        piece = self._give("".join(texts))
        if not is_cut:  # nothing was taken away, so the tokens without text belong to it as well
            piece.logprobs.extend(self._waiting_logprobs)
        self._waiting_logprobs.clear()
        piece.finish_reason = reason
        piece.stop_reason = stop_reason
        return piece


class PromptEcho:
    """The prompt as the beginning of each of its choices' text.

    Args:
        tokenizer: the model's.
        token_ids: the prompt.
        text: the prompt as the client wrote it; None to decode the ids.
        rules: if they have log-probabilities, the engine's of the prompt must be complete first.
    """

    def __init__(self, tokenizer: Tokenizer, token_ids: Sequence[int], text: str | None, rules: TextRules) -> None:
        self._tokenizer = tokenizer
        self._token_ids = token_ids
        self._has_logprobs = rules.has_logprobs
        self._has_special_tokens = text is not None or not rules.skip_special_tokens
        if text is None:
            text = tokenizer.decode(token_ids, skip_special_tokens=rules.skip_special_tokens)
        self.text = text

    def piece(self, logprobs: Sequence[TokenLogprobs]) -> Piece:
        """Return the prompt's text and log-probabilities (``logprobs`` has one per token but the first)."""
        if not self._has_logprobs:
            return Piece(self.text)
        detokenizer = Detokenizer(self._tokenizer, skip_special_tokens=False)
        num_chars, num_added = 0, self._num_added()
        positioned = []
        for index, (values, token_id) in enumerate(zip([None, *logprobs], self._token_ids, strict=True)):
            positioned.append(PositionedLogprobs(min(num_chars, len(self.text)), values, token_id))
            is_control = token_id in self._tokenizer.special_token_ids
            if not is_control or (index >= num_added and self._is_written_at(num_chars, token_id)):
                num_chars += self._num_chars_at(num_chars, detokenizer.push(token_id))
        return Piece(self.text, positioned)

    def _num_added(self) -> int:
        """Control tokens at the beginning that the tokenizer has put before the same ones, written in the text."""
        first = self._token_ids[0]
        written = self._tokenizer.token_text(first)
        num_equal = sum(1 for _ in itertools.takewhile(first.__eq__, self._token_ids))
        num_written = 0
        while num_written < num_equal and self.text.startswith(written, num_written * len(written)):
            num_written += 1
        return num_equal - num_written

    def _num_chars_at(self, num_chars: int, piece: str) -> int:
        """Length of a token's text there; behind a control token some tokenizers begin with a space of their own."""
        spaces = piece[: len(piece) - len(piece.lstrip(" "))]
        return len(piece) if self.text.startswith(spaces, num_chars) else len(piece) - 1

    def _is_written_at(self, num_chars: int, token_id: int) -> bool:
        """True if this control token is in the text there; the tokenizer adds some, and decoding may leave them out."""
        return self._has_special_tokens and self.text.startswith(self._tokenizer.token_text(token_id), num_chars)

    def is_complete(self, num_logprobs: int) -> bool:
        """True once ``piece`` can be called."""
        return not self._has_logprobs or num_logprobs == len(self._token_ids) - 1
