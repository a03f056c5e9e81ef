"""Pomona through its Python interface, the engine in this process."""

import importlib.metadata
import time

from benchmarks.peers.session import Outcome, Request, Work, main


class PomonaRunner:
    """``LLM`` with every adapter of the workload loaded."""

    def __init__(self, work: Work) -> None:
        from pomona import LLM

        self._work = work
        self._llm = LLM(
            work.model,
            adapters={adapter.name: adapter.path for adapter in work.adapters[: work.num_loaded]},
            max_model_len=work.max_tokens,
            prefix_cache=False,  # the same prompts come again in every repetition
            **work.settings,
        )

    def run(self, requests: list[Request], num_output_tokens: int) -> Outcome:
        from pomona import SamplingParams

        start = time.perf_counter()
        completions = self._llm.generate(
            [request.prompt for request in requests],
            adapter=[
                None if request.adapter is None else self._work.adapters[request.adapter].name for request in requests
            ],
            sampling=SamplingParams(max_tokens=num_output_tokens, temperature=0.0),
            ignore_eos=True,
        )
        return Outcome(
            token_ids=[completion.token_ids for completion in completions],
            first_token_s=[start + completion.ttft_s for completion in completions],
            finish_s=[start + completion.e2e_s for completion in completions],
        )

    def versions(self) -> dict[str, str]:
        import pomona

        return {"pomona": pomona.__version__, "torch": importlib.metadata.version("torch")}


if __name__ == "__main__":
    main(PomonaRunner)
