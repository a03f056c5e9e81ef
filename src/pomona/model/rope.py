"""Rotary embedding frequencies: from config.json to the table of cosines and sines that the kernels read.

Formulas: linear (position interpolation, arXiv 2306.15595), llama3 (Llama 3.1's frequency-dependent scaling), yarn
(arXiv 2309.00071). Computed in float32 in the order of operations that transformers uses, so that the angles are equal.
"""

import math
from typing import Any

import torch
from torch import Tensor

from pomona.core.errors import CheckpointError
from pomona.model.spec import RopeSpec

_LAYER_TYPES = ("full_attention", "sliding_attention")

# Kind -> (fields it needs, fields it may have).
_KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("original_max_position_embeddings",),
        ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}

_MOST_POSITIONS = 2**40
"""Far beyond any context, and far from where numbers end."""

_IGNORED = ("type", "rope_type", "rope_theta", "finetuned")


def _refuse(name: str, value: object, message: str) -> CheckpointError:
    return CheckpointError(f"config.json: {name} is {value!r}: {message}")


def read_rope(config: dict[str, Any], max_position_embeddings: int) -> tuple[RopeSpec, int]:
    """Find the rotary embedding in a parsed config.json.

    Args:
        config: transformers 4 style (``rope_theta`` and ``rope_scaling``) or 5 style (``rope_parameters``).
        max_position_embeddings: the checkpoint's own.

    Returns:
        The rotary embedding, and the number of positions it is good for: more than ``max_position_embeddings`` where
        linear scaling stretches it, or yarn the original context further.

    Raises:
        CheckpointError: an unknown kind or field, or a value out of range; the message names it.
    """
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    scaling = config.get(name) or {}
    if not isinstance(scaling, dict):
        raise _refuse(name, scaling, "must be an object")
    scaling = _flat(name, scaling)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if not isinstance(kind, str) or kind not in _KINDS:
        raise _refuse(f"{name}.rope_type", kind, f"supported are {', '.join(_KINDS)}")
    theta = _number(f"{name}.rope_theta", scaling.get("rope_theta") or config.get("rope_theta") or 10000.0)
    if "original_max_position_embeddings" in _KINDS[kind][0]:
        # A value beside the scaling wins over the one inside, as it does in transformers.
        outside = config.get("original_max_position_embeddings")
        inside = scaling.get("original_max_position_embeddings")
        original = max_position_embeddings if inside is None else inside
        scaling = {**scaling, "original_max_position_embeddings": original if outside is None else outside}
    params = _read_params(name, kind, scaling)
    if kind == "llama3" and params["high_freq_factor"] == params["low_freq_factor"]:
        raise _refuse(f"{name}.high_freq_factor", params["high_freq_factor"], "must differ from low_freq_factor")
    if kind == "yarn":
        original = params["original_max_position_embeddings"]
        params.setdefault("factor", max_position_embeddings / original)
        if theta <= 1:
            raise _refuse(f"{name}.rope_theta", theta, "must be above 1 for the kind 'yarn'")
        max_position_embeddings = max(max_position_embeddings, _stretched(name, params["factor"], original))
    if kind == "linear":
        # Checkpoints give the positions before interpolation: vLLM multiplies them too, transformers has no limit.
        stretched = _stretched(name, params["factor"], max_position_embeddings)
        max_position_embeddings = max(max_position_embeddings, stretched)
    return RopeSpec(theta=theta, kind=kind, params=tuple(sorted(params.items()))), max_position_embeddings


def _stretched(name: str, factor: float, num_positions: float) -> int:
    if factor * num_positions > _MOST_POSITIONS:
        raise _refuse(f"{name}.factor", factor, f"stretches the context past {_MOST_POSITIONS} positions")
    return int(factor * num_positions)


def _read_params(name: str, kind: str, scaling: dict[str, Any]) -> dict[str, float | int | bool]:
    needed, optional = _KINDS[kind]
    params: dict[str, float | int | bool] = {}
    for field, value in scaling.items():
        if field in _IGNORED or (field == "partial_rotary_factor" and value == 1):
            continue
        if value is None and field != "truncate":  # where null, unlike nothing, means false
            continue
        if field in ("mscale", "mscale_all_dim") and value == 0:  # as if it were not there
            continue
        if field not in (*needed, *optional):
            raise _refuse(f"{name}.{field}", value, f"not supported for the kind {kind!r}")
        params[field] = bool(value) if field == "truncate" else _number(f"{name}.{field}", value)
    for field in needed:
        if field not in params:
            raise CheckpointError(f"config.json: {name}.{field} is missing: the kind {kind!r} needs it")
    return params


def _flat(name: str, scaling: dict[str, Any]) -> dict[str, Any]:
    """Parameters given per layer type are one set if they are equal."""
    nested = [value for field, value in scaling.items() if field in _LAYER_TYPES]
    if not nested:
        return scaling
    if len(nested) != len(scaling) or not isinstance(nested[0], dict) or any(other != nested[0] for other in nested):
        raise _refuse(name, scaling, "layer types with different rotary embeddings are not supported")
    return nested[0]


def _number(name: str, value: object) -> float | int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < math.inf:
        raise _refuse(name, value, "must be a positive number")
    return value


def cos_sin_table(rope: RopeSpec, head_dim: int, num_positions: int, device: torch.device) -> Tensor:
    """The table ``kernels.rope.apply_rope`` reads.

    Returns:
        float32 [num_positions, head_dim]: cosines of the head_dim / 2 angles, then their sines, both multiplied by the
        kind's attention factor.
    """
    frequencies, attention_factor = _frequencies(rope, head_dim)
    angles = torch.arange(num_positions, dtype=torch.float32).unsqueeze(1) * frequencies
    table = torch.cat((angles.cos(), angles.sin()), dim=-1)
    if attention_factor != 1.0:
        table *= attention_factor
    return table.to(device)


def _frequencies(rope: RopeSpec, head_dim: int) -> tuple[Tensor, float]:
    """Angle per position, float32 [head_dim / 2], and the factor on cosines and sines."""
    params = dict(rope.params)
    powers = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    frequencies = 1.0 / powers
    if rope.kind == "linear":
        return frequencies / params["factor"], 1.0
    if rope.kind == "llama3":
        return _llama3(frequencies, params), 1.0
    if rope.kind == "yarn":
        return _yarn(powers, rope.theta, params)
    # Dynamic scaling starts beyond max_position_embeddings, which is where Pomona ends a sequence.
    assert rope.kind in ("default", "dynamic")
    return frequencies, 1.0


def _llama3(frequencies: Tensor, params: dict[str, float | int | bool]) -> Tensor:
    """Keep high frequencies, divide low ones by the factor, blend between."""
    factor, low, high = params["factor"], params["low_freq_factor"], params["high_freq_factor"]
    original = params["original_max_position_embeddings"]
    wavelengths = 2 * math.pi / frequencies
    scaled = torch.where(wavelengths > original / low, frequencies / factor, frequencies)
    blend = (original / wavelengths - low) / (high - low)
    blended = (1 - blend) * scaled / factor + blend * scaled
    is_between = (wavelengths >= original / high) & (wavelengths <= original / low)
    return torch.where(is_between, blended, scaled)


def _yarn(powers: Tensor, theta: float, params: dict[str, float | int | bool]) -> tuple[Tensor, float]:
    """Interpolate the frequencies that turn few times over the original context, keep those that turn often."""
    factor, original = params["factor"], params["original_max_position_embeddings"]
    head_dim = 2 * powers.numel()

    def dimension_of(num_turns: float) -> float:
        return head_dim * math.log(original / (num_turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = dimension_of(params.get("beta_fast", 32)), dimension_of(params.get("beta_slow", 1))
    if params.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - first) / (last - first)).clamp(0, 1)
    kept = 1 - ramp
    frequencies = 1.0 / (factor * powers) * (1 - kept) + 1.0 / powers * kept
    return frequencies, _yarn_attention_factor(params)


def _yarn_attention_factor(params: dict[str, float | int | bool]) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if params["factor"] <= 1 else 0.1 * weight * math.log(params["factor"]) + 1.0

    if "attention_factor" in params:
        return float(params["attention_factor"])
    if "mscale" in params and "mscale_all_dim" in params:
        return mscale(params["mscale"]) / mscale(params["mscale_all_dim"])
    return mscale(1.0)
