"""An adapter's identity: a digest of its bytes, never its name or place. Prefix-cache keys, pages and logs use it.

The bytes are taken as they are. The same adapter with its JSON keys in another order, or as .bin instead of
.safetensors, gets another id: that costs memory at worst, while a digest of a *parsed* config could one day give two
different adapters the same id.
"""

import hashlib

from pomona.core.adapter import AdapterFiles
from pomona.core.ids import AdapterId


class DigestWriter:
    """The digest of an adapter whose weights arrive in pieces.

    Args:
        weights_format: "safetensors" or "bin".
        config_bytes: adapter_config.json.
        num_weights_bytes: of all pieces together.
    """

    def __init__(self, weights_format: str, config_bytes: bytes, num_weights_bytes: int) -> None:
        self._digest = hashlib.sha256(b"pomona-adapter-1")
        for part in (weights_format.encode(), config_bytes):
            self._digest.update(len(part).to_bytes(8, "big"))
            self._digest.update(part)
        self._digest.update(num_weights_bytes.to_bytes(8, "big"))

    def write(self, piece: bytes) -> None:
        """Take in the next piece of the weights."""
        self._digest.update(piece)

    def adapter_id(self) -> AdapterId:
        """Return the digest of what was taken in."""
        return AdapterId(self._digest.hexdigest())


def adapter_digest(files: AdapterFiles) -> AdapterId:
    """Return the SHA-256 (64 hex digits) of format, config and weights, each part preceded by its length."""
    digest = DigestWriter(files.weights_format, files.config_bytes, len(files.weights_bytes))
    digest.write(files.weights_bytes)
    return digest.adapter_id()
