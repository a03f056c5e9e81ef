"""The files that hold a checkpoint's tensors: which there are, what is in them, and reading one tensor at a time."""

import pickle
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pomona.core.errors import CheckpointError
from pomona.model.hf_config import read_json

TensorInfo = tuple[tuple[int, ...], str]
"""Shape, and dtype by torch's name where torch and safetensors agree on one."""

_SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

# The file of an unsharded checkpoint, in the order of preference; its shards' index has ".index.json" appended.
_FILE_NAMES = ("model.safetensors", "pytorch_model.bin")

# What torch.load raises for files that are truncated, corrupt, or pickles of something else than tensors.
_TORCH_LOAD_ERRORS = (
    RuntimeError,
    pickle.UnpicklingError,
    OSError,
    EOFError,
    ValueError,
    KeyError,
    AttributeError,
    IndexError,
    TypeError,
)


def find_files(folder: Path) -> list[Path]:
    """The files that make up the checkpoint: one, or all shards, safetensors before .bin.

    Raises:
        CheckpointError: there are none, or an index names a file that is not in the folder.
    """
    for name in _FILE_NAMES:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _shards(index)
    names = ", ".join(name for base in _FILE_NAMES for name in (base, f"{base}.index.json"))
    raise CheckpointError(f"{folder}: no weights found; looked for {names}")


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is missing or empty")
    names = list(dict.fromkeys(map(str, weight_map.values())))
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index}: {name!r} is not the name of a file in the same folder")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index}: the shard {name} is missing")
    return [index.parent / name for name in names]


def _load_pickled(path: Path) -> dict[str, Tensor]:
    """A .bin file's tensors, memory-mapped if it is of the zip kind. Never runs code from the file."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except _TORCH_LOAD_ERRORS as error:
        raise CheckpointError(f"{path}: corrupt, or not a file of tensors alone: {error}") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path}: holds a {type(loaded).__name__}, not named tensors")
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise CheckpointError(f"{path}: entry {name!r} is not a named dense tensor")
    return loaded


def describe_tensors(path: Path) -> dict[str, TensorInfo]:
    """Shape and dtype of every tensor in a file, without reading the values where the format allows.

    Raises:
        CheckpointError: the file is unreadable, truncated or not what its name says.
    """
    if path.suffix != ".safetensors":
        tensors = _load_pickled(path)
        return {name: (tuple(tensor.shape), str(tensor.dtype).split(".")[-1]) for name, tensor in tensors.items()}
    try:
        with safe_open(path, framework="pt") as file:
            infos: dict[str, TensorInfo] = {}
            for name in file.keys():  # noqa: SIM118 (safe_open is not iterable)
                part = file.get_slice(name)
                dtype = part.get_dtype()
                infos[name] = tuple(part.get_shape()), _SAFETENSORS_DTYPES.get(dtype, dtype)
            return infos
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    """What to say of a file that safetensors refuses: of one that this user may not read it says that there is none."""
    try:
        path.open("rb").close()
    except OSError as reason:
        return CheckpointError(f"{path}: cannot be read: {reason.strerror}")
    return CheckpointError(f"{path}: corrupt or truncated: {error}")


def read_tensors(path: Path, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """The named tensors of one file, one after the other, on the CPU. They may share memory with the mapped file.

    Raises:
        CheckpointError: the file is unreadable or truncated.
    """
    if path.suffix != ".safetensors":
        tensors = _load_pickled(path)
        yield from ((name, tensors[name]) for name in names)
        return
    try:
        with safe_open(path, framework="pt") as file:
            for name in names:
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error
