"""What an adapter is, without its weights: the parsed adapter_config.json, and the facts known once it is staged."""

from dataclasses import dataclass, field

from pomona.core.ids import AdapterId


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """adapter_config.json of a PEFT LoRA adapter, parsed and checked; only fields that change the output are kept.

    Which modules are adapted, and with what rank and scaling, is resolved against a base model's module names by
    ``adapters.targets``.
    """

    lora_rank: int
    lora_alpha: float
    target_modules: tuple[str, ...] | str | None
    """Name suffixes; or one regular expression that must match the whole name; or "all-linear"; or None."""
    exclude_modules: tuple[str, ...] | str | None = None
    use_rslora: bool = False
    """Scaling is alpha / sqrt(r) instead of alpha / r."""
    use_dora: bool = False
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    bias: str = "none"
    """"none", "all" or "lora_only": which of the base's biases the adapter replaces."""
    lora_bias: bool = False
    """lora_B has a bias of its own."""
    modules_to_save: tuple[str, ...] = ()
    fan_in_fan_out: bool = False
    trainable_token_indices: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """(embedding module name, token ids whose rows the adapter replaces)."""
    base_model_name: str | None = None


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """A staged adapter: read, verified against the base model, converted, and ready to become resident."""

    adapter_id: AdapterId
    lora_rank: int
    """The largest rank of any module; 0 if only full-weight parts are adapted."""
    num_pages: int
    """Device pages it occupies while resident, full-weight parts (DoRA, biases, saved modules) included."""
    num_host_bytes: int
    modules: tuple[str, ...] = field(default=())
    """Adapted kinds of module, for people: ("q_proj", "v_proj")."""
    features: tuple[str, ...] = ()
    """Special features in use, for people: ("rslora", "dora", "modules_to_save")."""
