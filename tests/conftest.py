"""Before any test module: without a GPU Triton interprets its kernels, and nothing reaches for the network."""

import os
import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from support.triton_sampling import _tensors_where_the_kernels_run, pytest_collection_modifyitems  # noqa: F401

# All are read when the libraries are imported or first used, which the test modules do.
if torch.cuda.is_available():
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # or there are no products while kernels' memory is poisoned
else:
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# How fast the machine is at the moment is no property of the code.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")
torch.set_num_threads(1)  # the tensors of tests are tiny: more threads only wait for each other


@pytest.fixture(autouse=True)
def _seed_everything() -> None:
    """Whatever a test draws without a generator of its own, it draws the same every time."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (third-party code uses it)
    torch.manual_seed(0)
