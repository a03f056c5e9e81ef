"""The tensors of an adapter file: parsed without running code, named by (module, part), each taken exactly once.

Key spellings of all PEFT versions are understood: with or without the ``base_model.model.`` prefix, with or without the
adapter's name inside.
"""

import io
import pickle
import re
import struct
import zipfile
from collections.abc import Sequence

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from pomona.core.adapter import AdapterFiles
from pomona.core.errors import AdapterError

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PREFIX = "base_model.model."
_LORA_KEY = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_embedding_A|lora_embedding_B|lora_A|lora_B|lora_magnitude_vector)"
    r"(?:\.(?!weight$|bias$)[^.]+)?(?P<leaf>\.weight|\.bias)?"
)
_TOKENS_KEY = re.compile(r"(?P<module>.+?)\.token_adapter\.trainable_tokens_delta(?:\.[^.]+)?")
_BASE_KEY = re.compile(r"(?P<module>.+?)(?:\.token_adapter)?\.base_layer\.(?P<leaf>weight|bias)")
_COPY_KEY = re.compile(r"(?P<module>.+?)\.(?P<part>original_module|modules_to_save)\.(?P<leaf>weight|bias)")
_SAVED_KEY = re.compile(r"(?P<module>.+?)(?:\.modules_to_save\.[^.]+)?\.(?P<leaf>weight|bias)")
_MALFORMED = (
    SafetensorError, pickle.UnpicklingError, zipfile.BadZipFile, struct.error, RuntimeError, EOFError, ValueError,
    TypeError, KeyError, IndexError, AttributeError, AssertionError, OverflowError, MemoryError,
)  # fmt: skip
"""What the two parsers raise on bytes that are not what they should be."""


def parse_tensors(files: AdapterFiles) -> dict[str, Tensor]:
    """Parse the weights file; values are not looked at yet.

    Raises:
        AdapterError: truncated, corrupt, holding anything but dense floating-point tensors, or asking to run code.
    """
    if files.weights_format == "safetensors":
        try:
            tensors = safetensors.torch.load(files.weights_bytes)
        except _MALFORMED as error:
            raise AdapterError(f"adapter_model.safetensors is truncated or corrupt: {_first_line(error)}") from error
    else:
        tensors = _parse_bin(files.weights_bytes)
    for key, tensor in tensors.items():
        if tensor.dtype not in FLOAT_DTYPES or tensor.layout is not torch.strided or tensor.device.type != "cpu":
            kind = str(tensor.dtype).removeprefix("torch.")
            raise AdapterError(f"tensor {key} is {kind}: expected float32, float16, bfloat16 or float64")
    return tensors


def _parse_bin(weights_bytes: bytes) -> dict[str, Tensor]:
    name = "adapter_model.bin"
    if not zipfile.is_zipfile(io.BytesIO(weights_bytes)):
        raise AdapterError(f"{name} is truncated, corrupt, or not written by torch.save since version 1.6")
    try:
        with zipfile.ZipFile(io.BytesIO(weights_bytes)) as archive:
            num_bytes = sum(member.file_size for member in archive.infolist())
        # torch.save stores without compression: anything larger than the file would be unpacked from a bomb
        if num_bytes > len(weights_bytes):
            raise AdapterError(f"{name} is compressed: save it again with torch.save, or as safetensors")
        loaded = torch.load(io.BytesIO(weights_bytes), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise AdapterError(
            f"{name} holds something other than tensors and was not executed; save it as adapter_model.safetensors"
        ) from error
    except _MALFORMED as error:
        raise AdapterError(f"{name} is truncated or corrupt: {_first_line(error)}") from error
    if not isinstance(loaded, dict):
        raise AdapterError(f"{name} holds a {type(loaded).__name__}: expected a dictionary of tensors")
    for key, tensor in loaded.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise AdapterError(f"{name} holds {str(key)[:80]!r}, which is not a tensor")
    # A tensor may be a view that repeats a few stored numbers; of honest ones, only the two of a tied pair share them.
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in loaded.values())
    if num_bytes > 2 * len(weights_bytes):
        raise AdapterError(
            f"{name} has {len(weights_bytes)} bytes, but its tensors would take {num_bytes}: they share their storage; "
            f"save it as adapter_model.safetensors"
        )
    return {key: tensor.detach() for key, tensor in loaded.items()}


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


class AdapterState:
    """An adapter file's tensors by (module, part).

    Parts: ``lora_A``, ``lora_B``, ``lora_B.bias``, ``lora_embedding_A``, ``lora_embedding_B``,
    ``lora_magnitude_vector``, ``tokens``, ``weight`` and ``bias`` (of a module saved whole, or of an unadapted one),
    ``base.weight`` and ``base.bias`` (under an adapted module), and ``original_module.bias`` and
    ``modules_to_save.bias`` (which bias="all" drags along for a module saved whole).
    """

    def __init__(self, tensors: dict[str, Tensor], base_model_name: str | None) -> None:
        """Sort the tensors by what their keys say.

        Args:
            tensors: from ``parse_tensors``.
            base_model_name: what the config names, for messages.

        Raises:
            AdapterError: a key that says nothing we know, or two keys for one tensor.
        """
        self._made_for = f" (its config names {base_model_name!r})" if base_model_name else ""
        self._left: dict[tuple[str, str], tuple[str, Tensor]] = {}
        for key, tensor in tensors.items():
            place = _place(key)
            if place in self._left:
                raise AdapterError(f"tensors {self._left[place][0]} and {key} mean the same weight")
            self._left[place] = (key, tensor)

    def has(self, module: str, part: str) -> bool:
        """True if the tensor is there and not taken yet."""
        return (module, part) in self._left

    def take(self, module: str, part: str, shape: Sequence[int]) -> Tensor:
        """Take a tensor that must be there.

        Args:
            module: full module name.
            part: see the class.
            shape: what this base model and config require.

        Raises:
            AdapterError: missing, of another shape, or holding NaN or infinity.
        """
        key, tensor = self._left.pop((module, part), ("", None))
        if tensor is None:
            raise AdapterError(f"the {part} of {module} is missing from the weights; the config says it is adapted")
        if tuple(tensor.shape) != tuple(shape):
            raise AdapterError(
                f"tensor {key} has shape {list(tensor.shape)}, expected {list(shape)} for this base model and config: "
                f"{self._hint(part, tuple(tensor.shape), tuple(shape))}"
            )
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"tensor {key} holds NaN or infinity")
        return tensor

    def _hint(self, part: str, found: tuple[int, ...], expected: tuple[int, ...]) -> str:
        rank_dim = {"lora_A": 0, "lora_B": 1, "lora_embedding_A": 0, "lora_embedding_B": 1}.get(part)
        if rank_dim is not None and len(found) == 2 and found[1 - rank_dim] == expected[1 - rank_dim]:
            return f"the weights have rank {found[rank_dim]}, the config says {expected[rank_dim]}"
        if part in ("weight", "base.weight") and len(found) == len(expected) == 2 and found[1] == expected[1]:
            return f"its vocabulary has {found[0]} tokens, the base model's {expected[0]}"
        return f"the adapter was made for another base model{self._made_for}"

    def ignore(self, module: str, part: str) -> None:
        """Drop a tensor that cannot change the output, if it is there."""
        self._left.pop((module, part), None)

    def check_modules(self, known_modules: Sequence[str]) -> None:
        """Refuse tensors of modules that the base model does not have.

        Raises:
            AdapterError: naming the first of them.
        """
        known = frozenset(known_modules)
        for (module, _), (key, _) in self._left.items():
            if module not in known:
                raise AdapterError(
                    f"tensor {key} adapts {module!r}, which this base model does not have: "
                    f"the adapter was made for another base model{self._made_for}"
                )

    def check_all_taken(self) -> None:
        """Refuse tensors that nothing asked for.

        Raises:
            AdapterError: naming the first of them.
        """
        for key, _ in self._left.values():
            raise AdapterError(f"tensor {key} is not used by anything in adapter_config.json")


def _place(key: str) -> tuple[str, str]:
    """(module, part) of a key."""
    name = key.replace("_orig_mod.", "").removeprefix(_PREFIX)  # the former is left by torch.compile
    if match := _LORA_KEY.fullmatch(name):
        is_bias = match["leaf"] == ".bias"
        return match["module"], match["part"] + (".bias" if is_bias else "")
    if match := _TOKENS_KEY.fullmatch(name):
        return match["module"], "tokens"
    if match := _BASE_KEY.fullmatch(name):
        return match["module"], f"base.{match['leaf']}"
    if match := _COPY_KEY.fullmatch(name):
        return match["module"], f"{match['part']}.{match['leaf']}"
    if match := _SAVED_KEY.fullmatch(name):
        return match["module"], match["leaf"]
    raise AdapterError(f"tensor {key[:200]}: not a name that PEFT gives to a LoRA adapter's weights")
