"""Hugging Face module names of the base model, and which part of our network each one is. Used when adapters are
resolved and loaded; the network itself never looks at names.
"""

from dataclasses import dataclass

from pomona.core.adapter import EMBEDDING_NAME, HEAD_NAME, BaseModules
from pomona.model.spec import TARGET_NAMES, TARGET_PARENTS, ModelSpec, Target

FINAL_NORM = (-1, "norm")
"""Key of the norm before lm_head among norms by (layer, name)."""


@dataclass(frozen=True, slots=True)
class ModuleMap:
    """Names to parts, and back."""

    base: BaseModules
    targets: dict[str, tuple[int, Target]]
    """Projection name -> (layer, target)."""
    norms: dict[str, tuple[int, str]]
    """Norm name -> (layer or -1, attribute name)."""


def map_modules(spec: ModelSpec) -> ModuleMap:
    """List every module of the Hugging Face implementation of this base model, in its own order."""
    targets: dict[str, tuple[int, Target]] = {}
    norms: dict[str, tuple[int, str]] = {}
    names = ["model", EMBEDDING_NAME, "model.layers"]
    for layer in range(spec.num_layers):
        prefix = f"model.layers.{layer}"
        names.append(prefix)
        for parent in ("self_attn", "mlp"):
            names.append(f"{prefix}.{parent}")
            for target in Target:
                if TARGET_PARENTS[target] == parent:
                    name = f"{prefix}.{parent}.{TARGET_NAMES[target]}"
                    targets[name] = (layer, target)
                    names.append(name)
            if parent == "self_attn" and spec.has_qk_norm:
                for norm in ("q_norm", "k_norm"):
                    norms[f"{prefix}.{parent}.{norm}"] = (layer, norm)
                    names.append(f"{prefix}.{parent}.{norm}")
        names.append(f"{prefix}.mlp.act_fn")
        for norm in ("input_layernorm", "post_attention_layernorm"):
            norms[f"{prefix}.{norm}"] = (layer, norm)
            names.append(f"{prefix}.{norm}")
    norms["model.norm"] = FINAL_NORM
    names += ["model.norm", "model.rotary_emb", HEAD_NAME]
    base = BaseModules(names=tuple(names), linears=tuple(targets), norms=tuple(norms), is_tied=spec.is_tied)
    return ModuleMap(base=base, targets=targets, norms=norms)


def norm_size(spec: ModelSpec, name: str) -> int:
    """Elements of a norm's weight."""
    return spec.head_dim if name in ("q_norm", "k_norm") else spec.hidden_size
