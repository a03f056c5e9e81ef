"""transformers with peft: one batch whose rows name their adapters (``generate(adapter_names=...)``)."""

import importlib.metadata
import time
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from benchmarks.peers.session import Outcome, Request, Work, main

_NO_ADAPTER = "__base__"
"""peft's name for a row without an adapter."""


class _TokenClock(StoppingCriteria):
    """Called once per generated token of the batch; notes when. Stops nothing."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **options: object) -> torch.Tensor:
        self.times_s.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class TransformersRunner:
    """A bfloat16 model in eager mode; adapters in bfloat16 too, which was faster than peft's default float32."""

    def __init__(self, work: Work) -> None:
        torch.set_num_threads(work.settings.get("num_threads", torch.get_num_threads()))
        self._work = work
        model: Any = AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.bfloat16)
        model.eval()
        model.generation_config.eos_token_id = None  # nothing ends early, and nothing is spent on preventing it
        model.generation_config.pad_token_id = 0
        if work.num_loaded:
            first, *others = work.adapters[: work.num_loaded]
            model = PeftModel.from_pretrained(model, first.path, adapter_name=first.name, autocast_adapter_dtype=False)
            for adapter in others:
                model.load_adapter(adapter.path, adapter_name=adapter.name, autocast_adapter_dtype=False)
            model.eval()
        self._model = model

    @torch.inference_mode()
    def run(self, requests: list[Request], num_output_tokens: int) -> Outcome:
        input_ids = torch.tensor([request.prompt for request in requests])
        clock = _TokenClock()
        options = {}
        if self._work.num_loaded:
            options["adapter_names"] = [
                _NO_ADAPTER if request.adapter is None else self._work.adapters[request.adapter].name
                for request in requests
            ]
        output = self._model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            do_sample=False,
            max_new_tokens=num_output_tokens,
            stopping_criteria=StoppingCriteriaList([clock]),
            **options,
        )
        return Outcome(
            token_ids=output[:, input_ids.shape[1] :].tolist(),
            first_token_s=[clock.times_s[0]] * len(requests),
            finish_s=[clock.times_s[-1]] * len(requests),
        )

    def versions(self) -> dict[str, str]:
        return {name: importlib.metadata.version(name) for name in ("transformers", "peft", "torch")}


if __name__ == "__main__":
    main(TransformersRunner)
