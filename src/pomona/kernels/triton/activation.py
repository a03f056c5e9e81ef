"""SwiGLU on a GPU."""

import torch
from torch import Tensor

from pomona.kernels.triton.configs import config_for
from pomona.kernels.triton.launch import Launch
from pomona.kernels.triton.row_kernels import silu_mul_kernel


def silu_mul_launch(gate_up: Tensor, out: Tensor) -> Launch:
    """See ``kernels.activation.silu_mul``; rows of gate_up must be dense, ``out`` contiguous."""
    num_tokens, features = out.shape
    config = config_for("silu_mul", gate_up.device, features=features)
    block = min(config["block"], 1 << (features - 1).bit_length())
    return Launch(
        kernel=silu_mul_kernel,
        grid=(num_tokens, -(-features // block)),
        args=(gate_up, out, features, gate_up.stride(0)),
        constants={"BLOCK": block},
        num_warps=config["num_warps"],
        num_stages=1,
    )


def silu_mul(gate_up: Tensor) -> Tensor:
    """See ``kernels.activation.silu_mul``."""
    if gate_up.stride(1) != 1:
        gate_up = gate_up.contiguous()
    num_tokens, doubled = gate_up.shape
    out = torch.empty((num_tokens, doubled // 2), dtype=gate_up.dtype, device=gate_up.device)
    silu_mul_launch(gate_up, out).run()
    return out
