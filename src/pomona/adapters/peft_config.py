"""adapter_config.json -> AdapterSpec. Every key that PEFT's LoraConfig can write, now or in older versions, is
honoured, accepted because it cannot change what a trained adapter computes, or refused by name.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pomona.core.adapter import EMBEDDING_NAME, AdapterSpec
from pomona.core.errors import AdapterConfigError

_Number = TypeVar("_Number", int, float)

MAX_CONFIG_BYTES = 2**20
MAX_LORA_RANK = 2**16
"""Of any module; ``model.adapter_weights`` refuses projections of ranks that the kernels do not take."""
MAX_NAME_CHARS = 4096
"""Longest module name or pattern."""

ACCEPTED_FIELDS: Mapping[str, str] = {
    "auto_mapping": "names the Python classes used in training",
    "corda_config": "only read while initializing a new adapter",
    "eva_config": "only read while initializing a new adapter",
    "inference_mode": "only freezes gradients",
    "loftq_config": "only read while initializing a new adapter",
    "lora_dropout": "dropout is off outside training",
    "lora_ga_config": "only read while initializing a new adapter",
    "megatron_core": "only read together with megatron_config, which is refused",
    "merge_weights": "whether weights were merged ahead of inference; the sum is the same (old PEFT)",
    "peft_version": "informational",
    "qalora_group_size": "only read together with use_qalora, which is refused",
    "revision": "which revision of the base model to download",
    "runtime_config": "PEFT drops it on loading",
}
"""Keys that cannot change inference, whatever their value, and why."""

REFUSED_FIELDS: Mapping[str, str] = {
    "alora_invocation_tokens": "Activated LoRA is not supported",
    "arrow_config": "Arrow routing between adapters is not supported",
    "enable_lora": "fused projections adapted in part are not supported",
    "kasa_config": "KaSA changes the base model's weights, which adapters share here",
    "layer_replication": "replicated layers would change the base model, which adapters share here",
    "megatron_config": "Megatron layers are not supported",
    "monteclora_config": "MonteCLoRA is not supported",
    "target_parameters": "adapting bare parameters is not supported; list modules in target_modules",
    "use_bdlora": "block-diagonal LoRA is not supported",
    "use_qalora": "QALoRA is not supported",
    "velora_config": "VeLoRA is not supported",
}
"""Keys accepted only when off (null, false or an empty list), and why."""

_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
"""init_lora_weights that leave the base model's weights as they are."""
_MUTATING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Prefixes of init_lora_weights that change the base model's weights before training."""
_MODULE_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")


def parse_config(config_bytes: bytes) -> AdapterSpec:
    """Parse and check adapter_config.json.

    Missing keys take LoraConfig's defaults, except ``peft_type``, which PEFT itself requires.

    Raises:
        AdapterConfigError: with the key that is wrong or unsupported ("(file)" if it is not a JSON object at all).
    """
    config = _load_object(config_bytes)
    _check_peft_type(config)
    _check_known(config)
    _check_init(config)
    use_dora = _boolean(config, "use_dora")
    lora_bias = _boolean(config, "lora_bias")
    if lora_bias and use_dora:
        raise AdapterConfigError("lora_bias", "cannot be combined with use_dora (PEFT refuses it too)")
    target_modules = _names_or_pattern(config, "target_modules")
    return AdapterSpec(
        lora_rank=_rank("r", config.get("r", 8)),
        lora_alpha=_finite("lora_alpha", config.get("lora_alpha", 8)),
        target_modules=target_modules,
        exclude_modules=_names_or_pattern(config, "exclude_modules"),
        use_rslora=_boolean(config, "use_rslora"),
        use_dora=use_dora,
        rank_pattern=_pattern_table(config, "rank_pattern", _rank),
        alpha_pattern=_pattern_table(config, "alpha_pattern", _finite),
        layers_to_transform=_layers_to_transform(config, target_modules),
        layers_pattern=_layers_pattern(config, target_modules),
        bias=_bias(config),
        lora_bias=lora_bias,
        modules_to_save=_modules_to_save(config),
        fan_in_fan_out=_boolean(config, "fan_in_fan_out"),
        trainable_token_indices=_token_indices(config),
        base_model_name=_optional_string(config, "base_model_name_or_path"),
        ensure_weight_tying=_boolean(config, "ensure_weight_tying"),
    )


HONOURED_FIELDS = frozenset(
    {
        "alpha_pattern", "base_model_name_or_path", "bias", "ensure_weight_tying", "exclude_modules",
        "fan_in_fan_out", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_bias",
        "modules_to_save", "peft_type", "r", "rank_pattern", "target_modules", "task_type",
        "trainable_token_indices", "use_dora", "use_rslora",
    }
)  # fmt: skip
"""Keys whose value decides what the adapter computes, or whether it is one we can serve."""


def _load_object(config_bytes: bytes) -> dict[str, Any]:
    if len(config_bytes) > MAX_CONFIG_BYTES:
        raise AdapterConfigError("(file)", f"{len(config_bytes)} bytes; the limit is {MAX_CONFIG_BYTES}")
    try:
        config = json.loads(config_bytes.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise AdapterConfigError("(file)", f"not UTF-8 text: {error.reason} at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise AdapterConfigError("(file)", f"not valid JSON: {error}") from error
    except RecursionError as error:
        raise AdapterConfigError("(file)", "not valid JSON: nested too deeply") from error
    except ValueError as error:  # an integer of thousands of digits
        raise AdapterConfigError("(file)", "a number has too many digits") from error
    if not isinstance(config, dict):
        raise AdapterConfigError("(file)", f"must be a JSON object, found {_kind(config)}")
    return config


def _check_peft_type(config: dict[str, Any]) -> None:
    peft_type = config.get("peft_type")
    if peft_type != "LORA":
        raise AdapterConfigError("peft_type", f"is {_show(peft_type)}; only LORA adapters are supported")
    task_type = config.get("task_type")
    if task_type not in (None, "CAUSAL_LM"):
        raise AdapterConfigError("task_type", f"is {_show(task_type)}; only CAUSAL_LM adapters are supported")


def _check_known(config: dict[str, Any]) -> None:
    for key, value in config.items():
        if key in REFUSED_FIELDS:
            if value is not None and value is not False and value != []:
                raise AdapterConfigError(key, f"is {_show(value)}: {REFUSED_FIELDS[key]}")
        elif key not in HONOURED_FIELDS and key not in ACCEPTED_FIELDS and value is not None:
            # null is how PEFT writes a feature that is off, so newer files stay loadable
            raise AdapterConfigError(_show_key(key), "unknown key; this version of Pomona does not know it")
    dropout = config.get("lora_dropout")
    if dropout is not None and not 0.0 <= _finite("lora_dropout", dropout) <= 1.0:
        raise AdapterConfigError("lora_dropout", f"is {_show(dropout)}: must be between 0 and 1")


def _check_init(config: dict[str, Any]) -> None:
    init = config.get("init_lora_weights", True)
    if init is None or isinstance(init, bool):
        return
    lora_bias = config.get("lora_bias", False)
    if isinstance(init, str) and init.lower() in _PLAIN_INITS:
        if lora_bias is True:
            raise AdapterConfigError("lora_bias", f"cannot be combined with init_lora_weights={init!r} (as in PEFT)")
        if init.lower() == "mica" and config.get("use_dora") is True:
            raise AdapterConfigError("use_dora", "cannot be combined with init_lora_weights='mica' (as in PEFT)")
        return
    if isinstance(init, str) and init.lower().startswith(_MUTATING_INITS):
        raise AdapterConfigError(
            "init_lora_weights",
            f"is {_show(init)}: this initialization changes the base model's weights, so the adapter does not fit the "
            f"shared base model. Convert it to a plain LoRA: save_pretrained(..., "
            f"path_initial_model_for_weight_conversion=...) in PEFT",
        )
    raise AdapterConfigError("init_lora_weights", f"is {_show(init)}: not an initialization this version knows")


def _layers_to_transform(
    config: dict[str, Any], target_modules: tuple[str, ...] | str | None
) -> tuple[int, ...] | None:
    name = "layers_to_transform"
    value = config.get(name)
    if value is None:
        return None
    if isinstance(target_modules, str):
        raise AdapterConfigError(name, "cannot be combined with a target_modules that is a string (as in PEFT)")
    layers = value if isinstance(value, list) else [value]
    for layer in layers:
        if not _is_integer(layer) or layer < 0:
            raise AdapterConfigError(name, f"holds {_show(layer)}: must be layer numbers from 0")
    return tuple(sorted(set(layers))) or None


def _layers_pattern(config: dict[str, Any], target_modules: tuple[str, ...] | str | None) -> tuple[str, ...]:
    name = "layers_pattern"
    value = config.get(name)
    if value is None:
        return ()
    if isinstance(target_modules, str):
        raise AdapterConfigError(name, "cannot be combined with a target_modules that is a string (as in PEFT)")
    if value in ("", []):
        return ()
    if config.get("layers_to_transform") is None:
        raise AdapterConfigError(name, "needs layers_to_transform as well (as in PEFT)")
    return _strings(name, value if isinstance(value, list) else [value])


def _bias(config: dict[str, Any]) -> str:
    bias = config.get("bias", "none")
    if bias not in ("none", "all", "lora_only"):
        raise AdapterConfigError("bias", f"is {_show(bias)}: must be none, all or lora_only")
    return str(bias)


def _modules_to_save(config: dict[str, Any]) -> tuple[str, ...]:
    name = "modules_to_save"
    value = config.get(name)
    if value is None:
        return ()
    if not isinstance(value, list):
        raise AdapterConfigError(name, f"is {_show(value)}: must be a list of module names")
    names = _strings(name, value)
    for module in names:
        if not _MODULE_NAME.fullmatch(module):
            raise AdapterConfigError(name, f"holds {_show(module)}: not a module name")
    return tuple(sorted(set(names)))


def _token_indices(config: dict[str, Any]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    name = "trainable_token_indices"
    value = config.get(name)
    if value is None:
        return ()
    tables = {EMBEDDING_NAME: value} if isinstance(value, list) else value
    if not isinstance(tables, dict):
        raise AdapterConfigError(name, f"is {_show(value)}: must be a list of token ids, or lists by module name")
    for module, token_ids in tables.items():
        if not _MODULE_NAME.fullmatch(module):
            raise AdapterConfigError(name, f"holds {_show(module)}: not a module name")
        if not isinstance(token_ids, list) or not token_ids:
            raise AdapterConfigError(name, f"{module}: must be a list of at least one token id")
        for token_id in token_ids:
            if not _is_integer(token_id) or not 0 <= token_id < 2**31:
                raise AdapterConfigError(name, f"{module} holds {_show(token_id)}: must be token ids from 0")
        if len(set(token_ids)) != len(token_ids):
            raise AdapterConfigError(name, f"{module}: a token id appears twice")
    return tuple((module, tuple(token_ids)) for module, token_ids in tables.items())


def _pattern_table(
    config: dict[str, Any], name: str, check: Callable[[str, Any], _Number]
) -> tuple[tuple[str, _Number], ...]:
    value = config.get(name)
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise AdapterConfigError(name, f"is {_show(value)}: must map module patterns to numbers")
    _strings(name, list(value))
    return tuple((pattern, check(name, number)) for pattern, number in value.items())


def _names_or_pattern(config: dict[str, Any], name: str) -> tuple[str, ...] | str | None:
    value = config.get(name)
    if value is None:
        return None
    if isinstance(value, str):
        return _strings(name, [value])[0]
    if not isinstance(value, list):
        raise AdapterConfigError(name, f"is {_show(value)}: must be a list of names, or a string")
    return tuple(sorted(set(_strings(name, value))))


def _strings(name: str, values: list[Any]) -> tuple[str, ...]:
    for value in values:
        if not isinstance(value, str) or not 0 < len(value) <= MAX_NAME_CHARS:
            raise AdapterConfigError(name, f"holds {_show(value)}: must be strings of 1 to {MAX_NAME_CHARS} characters")
    return tuple(values)


def _rank(name: str, value: Any) -> int:
    if not _is_integer(value) or not 1 <= value <= MAX_LORA_RANK:
        raise AdapterConfigError(name, f"is {_show(value)}: must be an integer from 1 to {MAX_LORA_RANK}")
    return int(value)


def _finite(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e30 <= value <= 1e30:
        raise AdapterConfigError(name, f"is {_show(value)}: must be a finite number")
    assert math.isfinite(value)
    return float(value)


def _boolean(config: dict[str, Any], name: str) -> bool:
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise AdapterConfigError(name, f"is {_show(value)}: must be true or false")
    return bool(value)


def _optional_string(config: dict[str, Any], name: str) -> str | None:
    value = config.get(name)
    if value is not None and not isinstance(value, str):
        raise AdapterConfigError(name, f"is {_show(value)}: must be a string or null")
    return value


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _kind(value: Any) -> str:
    return {list: "a list", str: "a string", bool: "true or false", type(None): "null"}.get(type(value), "a number")


def _show(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _show_key(key: str) -> str:
    return key if key.isprintable() and len(key) <= 80 else _show(key)
