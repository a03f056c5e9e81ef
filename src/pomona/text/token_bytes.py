"""The bytes behind each token id, read from a tokenizer's decoder.

Text is decoded by joining bytes, so that a stream of pieces and the whole are the same by construction. Where the
decoder's own rule for broken UTF-8 depends on what follows (byte fallback replaces a whole run of byte tokens), ours
does not: only the broken bytes become U+FFFD.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers

from pomona.core.errors import CheckpointError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level_alphabet() -> dict[str, int]:
    """The printable stand-in of each byte, as in GPT-2's byte-level BPE (openai/gpt-2, encoder.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + position): byte for position, byte in enumerate(others)})
    return alphabet


_BYTE_OF_CHAR = _byte_level_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF_CHAR[char] for char in token])
    except KeyError:  # an added token with characters outside the alphabet stands for itself
        return token.encode()


@dataclass(frozen=True, slots=True)
class DecodeRule:
    """How a token's string becomes bytes, and what is cut at the very start of a text."""

    to_bytes: Callable[[str], bytes]
    num_leading_spaces_cut: int = 0
    """At most this many spaces are removed from the start of the decoded text."""

    @classmethod
    def of(cls, backend: tokenizers.Tokenizer, where: str) -> "DecodeRule":
        """Read the rule from the ``decoder`` part of a tokenizer.

        Args:
            backend: the loaded tokenizer.
            where: file name for error messages.

        Raises:
            CheckpointError: the decoder is of a kind whose text cannot be built token by token.
        """
        spec = None if backend.decoder is None else json.loads(backend.decoder.__getstate__())
        parts: list[dict[str, Any]] = [] if spec is None else spec["decoders"] if spec["type"] == "Sequence" else [spec]
        kinds = [part["type"] for part in parts]
        if "ByteLevel" in kinds and set(kinds) <= {"ByteLevel", "Fuse"}:
            return cls(to_bytes=_byte_level_bytes)
        rule = _sentencepiece_rule(parts)
        if rule is None:
            found = "+".join(kinds) or "none"
            raise CheckpointError(
                f"{where}: decoder {found} is not supported: must be ByteLevel, Metaspace, or a "
                "sequence of Replace, ByteFallback, Fuse and Strip"
            )
        return rule


def _sentencepiece_rule(parts: Sequence[dict[str, Any]]) -> DecodeRule | None:
    """Rule of a [Replace..., ByteFallback, Fuse, Strip] sequence, or of Metaspace; None if it is anything else."""
    replacements: list[tuple[str, str]] = []
    has_byte_fallback = is_fused = False
    num_cut = 0
    for part in parts:
        match part:
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if not is_fused:
                replacements.append((old, new))
            case {"type": "ByteFallback"} if not is_fused:
                has_byte_fallback = True
            case {"type": "Metaspace", "replacement": str(mark), "prepend_scheme": str(scheme)} if len(parts) == 1:
                replacements.append((mark, " "))
                # The library drops every mark of the first token; more than one there is no tokenizer's doing.
                num_cut = 0 if scheme == "never" else 1
            case {"type": "Fuse"}:
                is_fused = True
            case {"type": "Strip", "content": " ", "start": int(start), "stop": 0} if is_fused:
                num_cut += start
            case _:
                return None
    if not parts:
        return None

    def to_bytes(token: str) -> bytes:
        if has_byte_fallback and (found := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(found[1], 16)])
        for old, new in replacements:
            token = token.replace(old, new)
        return token.encode()

    return DecodeRule(to_bytes=to_bytes, num_leading_spaces_cut=num_cut)
