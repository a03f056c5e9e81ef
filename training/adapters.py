"""The adapters of the bundled model: one per task, mixed on purpose in rank, targets and kind."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig

from pippin import BASE_NAME

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL_SEVEN = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class AdapterSpec:
    """How one task's adapter is shaped and how fast it learns."""

    task: str
    rank: int
    alpha: int
    targets: list[str] | str
    learning_rate: float = 3e-3
    extra: dict[str, Any] = field(default_factory=dict)

    def lora_config(self) -> LoraConfig:
        """The PEFT configuration."""
        return LoraConfig(
            task_type="CAUSAL_LM",
            base_model_name_or_path=BASE_NAME,
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=0.0,
            target_modules=self.targets,
            **self.extra,
        )


ADAPTERS: tuple[AdapterSpec, ...] = (
    AdapterSpec("upper", 4, 8, ["q_proj", "v_proj"]),
    AdapterSpec("reverse", 16, 32, "all-linear", 2e-3),
    AdapterSpec("sort", 64, 64, ALL_SEVEN, 2e-3),
    AdapterSpec("no-vowels", 8, 16, ["q_proj", "v_proj"]),
    AdapterSpec("double-letters", 8, 16, ATTENTION),
    AdapterSpec("pig-latin", 32, 16, ALL_SEVEN, 1e-3, {"use_rslora": True}),
    AdapterSpec("leet", 8, 16, ATTENTION, 2e-3, {"modules_to_save": ["lm_head"]}),
    AdapterSpec(
        "next-letter",
        16,
        32,
        ALL_SEVEN,
        2e-3,
        {
            "rank_pattern": {"layers.0.self_attn.q_proj": 4, "down_proj": 8},
            "alpha_pattern": {"layers.0.self_attn.q_proj": 16, "down_proj": 8},
        },
    ),
    AdapterSpec("spell", 16, 16, ["q_proj", "v_proj"]),
    AdapterSpec("swap-ends", 32, 32, "all-linear", 2e-3),
    AdapterSpec("alternate", 16, 32, ATTENTION, 2e-3, {"use_dora": True}),
    AdapterSpec("length", 4, 8, ["q_proj", "v_proj"]),
)
