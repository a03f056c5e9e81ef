"""An adapter's identity: a digest of its bytes, never its name or place. Prefix-cache keys, pages and logs use it.

The bytes are taken as they are. The same adapter with its JSON keys in another order, or as .bin instead of
.safetensors, gets another id: that costs memory at worst, while a digest of a *parsed* config could one day give two
different adapters the same id.
"""

import hashlib

from pomona.core.adapter import AdapterFiles
from pomona.core.ids import AdapterId


def adapter_digest(files: AdapterFiles) -> AdapterId:
    """Return the SHA-256 (64 hex digits) of format, config and weights, each part preceded by its length."""
    digest = hashlib.sha256(b"pomona-adapter-1")
    for part in (files.weights_format.encode(), files.config_bytes, files.weights_bytes):
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return AdapterId(digest.hexdigest())
