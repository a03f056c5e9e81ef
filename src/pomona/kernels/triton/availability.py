"""Whether Triton kernels can run in this process. Imported by the dispatcher, hence without Triton itself."""

import importlib.util
import os

import torch


def is_available() -> bool:
    """True if Triton is installed and has a GPU to compile for, or has been told to interpret its kernels.

    The environment variable is Triton's own; it must be set before any kernel module is imported.
    """
    if importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
