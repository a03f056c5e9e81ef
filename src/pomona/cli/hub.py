"""Where a base model's files are: a folder, the bundled model, or a Hugging Face hub id through its cache."""

import importlib.resources
from functools import partial
from pathlib import Path

from pomona.adapters.layout import CONFIG_FILE
from pomona.cli.config import BUNDLED_MODEL
from pomona.core.errors import CheckpointError

_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")
_NOT_WANTED = ("*/*", "consolidated*.safetensors")
"""The same weights in another program's layout (Mistral's repositories have them beside ours), and whole sub-folders
of them (original/, onnx/): nothing in a sub-folder is ever read."""
_OLD_WEIGHTS = "pytorch_model*.bin"
"""Downloaded only if there are no safetensors: many repositories have the same weights twice."""


def bundled_dir() -> Path:
    """Folder of the bundled model and adapters."""
    return Path(str(importlib.resources.files("pomona").joinpath("bundled")))


def checkpoint_dir(model: str) -> Path:
    """The local folder of a base model; downloads from the hub if needed.

    Raises:
        CheckpointError: it is nowhere, or no checkpoint, with what to try next.
    """
    folder = _folder_of(model)
    if not (folder / "config.json").is_file():
        if (folder / CONFIG_FILE).is_file():
            raise CheckpointError(f"model {model!r} is an adapter: pass its base model, and --adapter NAME={model}")
        raise CheckpointError(f"model {model!r} has no config.json: pass the folder of a Hugging Face checkpoint")
    return folder


def _folder_of(model: str) -> Path:
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if model == BUNDLED_MODEL:
        return bundled_dir() / BUNDLED_MODEL
    if path.exists() or model.startswith((".", "/", "~")) or model.partition("@")[0].count("/") > 1:
        raise CheckpointError(f"model {model!r}: no such folder")
    return _download(model)


def model_name(model: str) -> str:
    """The name under which a base is served by default: the last part of its folder or hub id."""
    if Path(model).expanduser().is_dir():
        return Path(model).expanduser().resolve().name
    repo_id, at, revision = model.partition("@")
    return repo_id.rpartition("/")[2] + at + revision


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repo_id, _, revision = hub_id.partition("@")
    try:
        fetch = partial(snapshot_download, repo_id, revision=revision or None, ignore_patterns=list(_NOT_WANTED))
        folder = Path(fetch(allow_patterns=list(_FILES)))
        if any(folder.glob("model*.safetensors")):
            return folder
        files = [*_FILES, _OLD_WEIGHTS]  # all of them: the repository may have changed meanwhile
        return Path(fetch(allow_patterns=files))
    except HFValidationError as error:
        raise CheckpointError(
            f"model {hub_id!r} is neither a folder nor a hub id such as 'meta-llama/Llama-3.2-1B'"
        ) from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"model {hub_id!r} is not in the local Hugging Face cache and the hub cannot be reached. "
            f"Go online once, or copy the checkpoint here and pass its folder."
        ) from error
    except HfHubHTTPError as error:
        raise CheckpointError(
            f"model {hub_id!r}: the hub refused it ({error}). Check the name; for gated models set HF_TOKEN."
        ) from error
    except OSError as error:
        raise CheckpointError(f"model {hub_id!r}: download failed: {error}") from error
