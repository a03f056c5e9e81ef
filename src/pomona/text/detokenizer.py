"""Token ids to text, one token at a time, never half a character.

One Detokenizer per choice being streamed. The pieces joined, flush included, are exactly ``Tokenizer.decode`` of all
ids.
"""

import codecs

from pomona.text.tokenizer import Tokenizer

_NEW_DECODER = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """Incremental decoder of one output.

    Args:
        tokenizer: whose ids they are.
        skip_special_tokens: leave control tokens out of the text.
        is_continuation: the text goes on from text before it, so a leading space is kept.
    """

    __slots__ = ("_decoder", "_num_spaces_to_cut", "_skipped", "_token_bytes")

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, is_continuation: bool = False
    ) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._decoder = _NEW_DECODER("replace")
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._num_spaces_to_cut = 0 if is_continuation else tokenizer.num_leading_spaces_cut

    def push(self, token_id: int) -> str:
        """Take the next token; return the characters that it completes, maybe none."""
        if token_id in self._skipped:
            return ""
        text = self._decoder.decode(self._token_bytes(token_id))
        return self._cut(text) if self._num_spaces_to_cut else text

    def flush(self) -> str:
        """End the text; return U+FFFD if a character was left incomplete, else nothing."""
        return self._decoder.decode(b"", final=True)

    def _cut(self, text: str) -> str:
        while text and self._num_spaces_to_cut:
            if text[0] != " ":
                self._num_spaces_to_cut = 0
                break
            text = text[1:]
            self._num_spaces_to_cut -= 1
        return text
