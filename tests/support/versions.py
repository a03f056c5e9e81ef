"""Adapters of the bundled model that can be told apart by what they answer, and what a name may have meant when."""

import itertools
import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from pomona.cli.hub import bundled_dir

_SCALE = 0.25
"""Of random weights: large enough that no two versions continue a prompt alike."""


def make_version(folder: Path, lora_rank: int, seed: int) -> None:
    """Write an adapter of the bundled model, all of its modules, with random weights."""
    spec = json.loads((bundled_dir() / "pippin" / "config.json").read_text())
    hidden, intermediate = spec["hidden_size"], spec["intermediate_size"]
    q_size = spec["num_attention_heads"] * spec["head_dim"]
    kv_size = spec["num_key_value_heads"] * spec["head_dim"]
    modules = {
        "self_attn.q_proj": (q_size, hidden),
        "self_attn.k_proj": (kv_size, hidden),
        "self_attn.v_proj": (kv_size, hidden),
        "self_attn.o_proj": (hidden, q_size),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    generator = np.random.default_rng(seed)
    tensors = {}
    for layer, (module, (rows, columns)) in itertools.product(range(spec["num_hidden_layers"]), modules.items()):
        prefix = f"base_model.model.model.layers.{layer}.{module}"
        for part, shape in (("lora_A", (lora_rank, columns)), ("lora_B", (rows, lora_rank))):
            tensors[f"{prefix}.{part}.weight"] = (_SCALE * generator.standard_normal(shape)).astype(np.float32)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "pippin",
        "r": lora_rank,
        "lora_alpha": lora_rank,
        "target_modules": [module.rpartition(".")[2] for module in modules],
    }
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")


@dataclass(slots=True)
class Change:
    """Somebody asked that a name mean something else."""

    version: str | None
    """None: that there be no such name."""
    began: float
    ended: float = math.inf
    """When the answer was there; infinite while it is not known whether, or when, it happened."""
    is_refused: bool = False
    """It never happened."""


class Meanings:
    """What names meant, as far as those who changed them can know: a change takes effect at one moment between its
    request and its answer. Times are numbers of a counter, so that no two are equal."""

    def __init__(self) -> None:
        self._ticks = itertools.count(1)
        # Before the first change there is no such name.
        self._changes = defaultdict[str, list[Change]](lambda: [Change(None, 0.0, 0.0)])

    def tick(self) -> int:
        """The time."""
        return next(self._ticks)

    def begin(self, name: str, version: str | None) -> Change:
        """A change is asked for."""
        change = Change(version, self.tick())
        self._changes[name].append(change)
        return change

    def end(self, change: Change, *, is_refused: bool = False) -> None:
        """It was answered."""
        change.ended = self.tick()
        change.is_refused = is_refused

    def possible(self, name: str, since: float, until: float) -> set[str | None]:
        """What the name may have meant at one moment between two times: every change that had begun, but those
        which a change of later had certainly undone. To be asked when all changes have been answered."""
        changes = [change for change in self._changes[name] if not change.is_refused]
        # Whatever had ended before this one began is past.
        settled = max(change.began for change in changes if change.ended < since)
        return {change.version for change in changes if change.began < until and change.ended >= settled}
