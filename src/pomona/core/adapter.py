"""What an adapter is, without its tensors: its files as read, the parsed adapter_config.json, what that config means
for a given base model, and the facts known once it is staged."""

from dataclasses import dataclass, field
from typing import Literal

from pomona.core.ids import AdapterId

EMBEDDING_NAME = "model.embed_tokens"
"""Full name of the input embedding in every supported base model."""
HEAD_NAME = "lm_head"
"""Full name of the output layer in every supported base model."""


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter folder, read once: what is hashed is what is checked is what is used."""

    config_bytes: bytes = field(repr=False)
    weights_bytes: bytes = field(repr=False)
    weights_format: Literal["safetensors", "bin"]


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
    """What the config says the adapter was trained on; only shown in messages."""
    ensure_weight_tying: bool = False
    """With tied embeddings, what the adapter does to the input embedding it also does to lm_head."""


@dataclass(frozen=True, slots=True)
class BaseModules:
    """The base model's modules by name, as Hugging Face names them: what an adapter's config is resolved against."""

    names: tuple[str, ...]
    """Every module, containers included, in the model's own order."""
    linears: tuple[str, ...]
    """The adaptable projections; lm_head is not one of them."""
    norms: tuple[str, ...]
    is_tied: bool
    """lm_head shares the embedding's weight."""


@dataclass(frozen=True, slots=True)
class ModuleLora:
    """The low-rank part of one module."""

    lora_rank: int
    scaling: float


@dataclass(frozen=True, slots=True)
class ResolvedAdapter:
    """A config applied to a base model's module names; all names are full names in the model's order."""

    spec: AdapterSpec
    loras: dict[str, ModuleLora]
    """Modules with a low-rank part."""
    saved_modules: tuple[str, ...]
    """Modules whose weights the adapter replaces whole."""
    token_indices: dict[str, tuple[int, ...]]
    """Module -> token ids whose rows the adapter replaces, in the order of the rows in the file."""
    head_follows: Literal["nothing", "lora", "saved_module", "tokens"] = "nothing"
    """Which part of lm_head is the input embedding's own, because PEFT ties them."""


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

    @property
    def has_extras(self) -> bool:
        """True if it is more than low-rank parts of the projections: steps with such rows take a longer way."""
        return not _LOW_RANK_FEATURES.issuperset(self.features)


_LOW_RANK_FEATURES = frozenset(("rslora", "rank_pattern", "alpha_pattern"))
"""Features that only change ranks and scalings."""
