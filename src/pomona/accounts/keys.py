"""API keys: ``pk-<id>-<secret>``. The id is visible everywhere; of the secret only a digest is kept.

The secret has 214 random bits, so a plain SHA-256 cannot be reversed by guessing and costs a microsecond per request.
"""

import hashlib
import hmac
import re
import secrets
import string
from dataclasses import dataclass
from typing import Final

_ID_ALPHABET: Final = string.ascii_lowercase + string.digits
_SECRET_ALPHABET: Final = string.ascii_letters + string.digits
_NUM_ID_CHARS: Final = 12
_NUM_SECRET_CHARS: Final = 36
_KEY: Final = re.compile(rf"pk-([a-z0-9]{{{_NUM_ID_CHARS}}})-[A-Za-z0-9]{{{_NUM_SECRET_CHARS}}}")


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key just made: the only moment at which its text exists here."""

    key_id: str
    text: str
    digest: bytes

    def __repr__(self) -> str:
        """Never the text: representations end up in logs."""
        return f"NewKey({visible_prefix(self.key_id)})"


def new_key() -> NewKey:
    """Draw a key."""
    key_id = "".join(secrets.choice(_ID_ALPHABET) for _ in range(_NUM_ID_CHARS))
    secret = "".join(secrets.choice(_SECRET_ALPHABET) for _ in range(_NUM_SECRET_CHARS))
    text = f"pk-{key_id}-{secret}"
    return NewKey(key_id, text, digest_of(text))


def digest_of(text: str) -> bytes:
    """Return what is stored of a key."""
    return hashlib.sha256(text.encode()).digest()


def key_id_of(text: str) -> str | None:
    """Return the id in a presented key, or None if it has not the form of one."""
    match = _KEY.fullmatch(text)
    return None if match is None else match[1]


def is_key(text: str, digest: bytes) -> bool:
    """Compare a presented key with a stored digest, in time that depends on neither."""
    return hmac.compare_digest(digest_of(text), digest)


def visible_prefix(key_id: str) -> str:
    """Return the part of a key that may be shown."""
    return f"pk-{key_id}"
