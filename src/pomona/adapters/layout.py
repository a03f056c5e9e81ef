"""Names and limits of the files in a PEFT adapter folder."""

from typing import Literal

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILES: tuple[tuple[str, Literal["safetensors", "bin"]], ...] = (
    ("adapter_model.safetensors", "safetensors"),
    ("adapter_model.bin", "bin"),
)
"""In PEFT's order of preference."""
MAX_WEIGHTS_BYTES = 16 * 2**30
