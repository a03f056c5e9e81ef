"""Text to token ids and back, from a checkpoint's tokenizer.json; built on the ``tokenizers`` library alone.

Read-only after loading, so any thread may use it. Encoding releases the GIL. Streaming is in ``detokenizer``.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import tokenizers

from pomona.core.errors import CheckpointError
from pomona.text.token_bytes import DecodeRule

TOKENIZER_FILE: Final = "tokenizer.json"
_NAMED_SPECIALS: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""In the order in which those that tokenizer.json lacks get their ids."""
_FLAGS: Final = ("single_word", "lstrip", "rstrip", "normalized")


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in ``path``, or an empty one if there is no such file.

    Raises:
        CheckpointError: the file is unreadable or holds no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, not {type(content).__name__}")
    return content


def _content_of(token: Any) -> str | None:
    """A special token is written as a string or as {"content": string, ...}."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) and token else None


class Tokenizer:
    """A checkpoint's tokenizer.

    Args:
        backend: the tokenizer; owned by this object from now on (truncation and padding are switched off).
        special_tokens: "bos_token", "eos_token", ... to their text.
        where: file name for error messages.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, special_tokens: Mapping[str, str], where: str = TOKENIZER_FILE
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._rule = DecodeRule.of(backend, where)
        self.special_tokens: Final = dict(special_tokens)
        """Text of the special tokens by name, as chat templates know them."""
        self.bos_token_id: Final = self._id_of("bos_token")
        self.eos_token_id: Final = self._id_of("eos_token")
        added = backend.get_added_tokens_decoder()
        self.special_token_ids: Final = frozenset(token_id for token_id, token in added.items() if token.special)
        """Ids of control tokens, which decoding leaves out unless asked to keep them."""
        self.vocab_size: Final = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        """One more than the largest token id."""
        self._bytes: list[bytes | None] = [None] * self.vocab_size

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Load tokenizer.json and its companions from a checkpoint's folder.

        Raises:
            CheckpointError: there is no tokenizer.json, or it is broken or of an unsupported kind.
        """
        path = folder / TOKENIZER_FILE
        if not path.is_file():
            raise CheckpointError(
                f'{folder} has no {TOKENIZER_FILE}. Write one with: python -c "from transformers import AutoTokenizer; '
                f"AutoTokenizer.from_pretrained('{folder}').save_pretrained('{folder}')\""
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for every kind of broken file
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
        config = read_json_object(folder / "tokenizer_config.json")
        if "added_tokens_decoder" not in config:
            # In older checkpoints this file has the last word; beside the newer field transformers does not read it.
            config |= read_json_object(folder / "special_tokens_map.json")
            added = read_json_object(folder / "added_tokens.json")
            config["added_tokens_decoder"] = {str(token_id): text for text, token_id in added.items()}
        where = folder / "tokenizer_config.json"
        named = _named_specials(config)
        specials = [*named.values(), *_extra_specials(config, where)]
        _add_declared_tokens(backend, config, specials, where)
        known = {token.content for token in backend.get_added_tokens_decoder().values()}
        backend.add_tokens([token for token in specials if token.content not in known])
        return cls(backend, {name: token.content for name, token in named.items()}, str(path))

    def _id_of(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        token_id: int | None = None if text is None else self._backend.token_to_id(text)
        return token_id

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of ``text``; special tokens written out in it become their ids.

        Args:
            text: valid Unicode (no lone surrogates).
            add_special_tokens: let the tokenizer add what it adds around a text, such as a beginning-of-sequence id.
        """
        # The batch form is the one that releases the GIL and skips offsets.
        encoding = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]
        ids: list[int] = encoding.ids
        return ids

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of ``token_ids``; broken UTF-8 becomes U+FFFD, ids without a token nothing."""
        skipped = self.special_token_ids if skip_special_tokens else ()
        joined = b"".join([self.token_bytes(token_id) for token_id in token_ids if token_id not in skipped])
        text = joined.decode("utf-8", "replace")
        num_spaces = len(text) - len(text.lstrip(" "))
        return text[min(num_spaces, self._rule.num_leading_spaces_cut) :]

    @property
    def num_leading_spaces_cut(self) -> int:
        """Spaces that decoding removes, if they are there, from the start of a text (sentencepiece's word mark)."""
        return self._rule.num_leading_spaces_cut

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that the token adds to a text; empty for ids that have no token."""
        if not 0 <= token_id < self.vocab_size:
            return b""
        known = self._bytes[token_id]
        if known is None:
            token = self._backend.id_to_token(token_id)
            known = b"" if token is None else self._rule.to_bytes(token)
            self._bytes[token_id] = known
        return known

    def token_text(self, token_id: int) -> str:
        """Return the token alone as text, with U+FFFD for parts of characters; for display only."""
        return self.token_bytes(token_id).decode("utf-8", "replace")


def _token_of(entry: Any, *, is_special: bool) -> tokenizers.AddedToken | None:
    """What a file says of a token as text or object; None if it says nothing."""
    text = _content_of(entry)
    if text is None:
        return None
    flags = {name: bool(entry[name]) for name in _FLAGS if isinstance(entry, Mapping) and name in entry}
    return tokenizers.AddedToken(text, special=is_special, **flags)


def _named_specials(config: Mapping[str, Any]) -> dict[str, tokenizers.AddedToken]:
    """Special tokens by name: those that every model may have, and a model's own, as ``image_token``."""
    own = {name: entry for name, entry in config.items() if name.endswith("_token")}
    extra = config.get("extra_special_tokens")
    entries = {name: config.get(name) for name in _NAMED_SPECIALS} | own | (extra if isinstance(extra, dict) else {})
    tokens = {name: _token_of(entry, is_special=True) for name, entry in entries.items()}
    return {name: token for name, token in tokens.items() if token is not None}


def _extra_specials(config: Mapping[str, Any], where: Path) -> list[tokenizers.AddedToken]:
    """Special tokens without a name."""
    name = "extra_special_tokens"
    if isinstance(config.get(name), dict) or not config.get(name):  # then its older name counts
        name = "additional_special_tokens"
    extra = config.get(name) or []
    if not isinstance(extra, list):
        raise CheckpointError(f"{where}: {name}: must be a list of tokens")
    return [token for entry in extra if (token := _token_of(entry, is_special=True)) is not None]


def _add_declared_tokens(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], specials: list[tokenizers.AddedToken], where: Path
) -> None:
    """Add tokens that only ``added_tokens_decoder`` knows, and make all that it declares what it says of them."""
    declared = config.get("added_tokens_decoder") or {}
    if not isinstance(declared, Mapping) or not all(key.isdecimal() for key in declared):
        raise CheckpointError(f"{where}: added_tokens_decoder: must be an object of token ids and what they are")
    before = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    # What tokenizer.json has as special stays so: the library never forgets it.
    special_texts = {token.content for token in (*before.values(), *specials) if token.special}
    for key, entry in sorted(declared.items(), key=lambda item: int(item[0])):
        text = _content_of(entry)
        is_new = text is not None and backend.token_to_id(text) is None
        if text is None or not (is_new or isinstance(entry, Mapping)):
            continue
        is_declared = isinstance(entry, Mapping) and bool(entry.get("special", False))
        token = _token_of(entry, is_special=is_declared or text in special_texts)
        if token != before.get(text):
            backend.add_tokens([token])
        if is_new and backend.token_to_id(text) != int(key):
            raise CheckpointError(
                f"{where}: added_tokens_decoder: token {text!r} has id {key}, but {TOKENIZER_FILE} leaves it "
                f"{backend.token_to_id(text)}"
            )
