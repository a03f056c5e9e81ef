"""vLLM's CPU build, offline, with its multi-LoRA support when adapters are loaded: all rows in one batch."""

import importlib.metadata
import os
import sys
import time
from pathlib import Path

from benchmarks.peers.session import Outcome, Request, Work, main

_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the largest cell needs less than half
    # All that it may run on; "auto" would leave a core unused.
    "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}
_PRELOADED = ("libiomp5.so", "libtcmalloc_minimal.so.4")
"""What vLLM's own guide says to preload on CPUs: Intel's OpenMP and tcmalloc."""
_LIBRARY_DIRS = (Path(sys.prefix) / "lib", Path("/usr/lib/x86_64-linux-gnu"), Path("/usr/lib64"))


def _restart_with_preloads() -> None:
    """Replace this process by itself with the libraries preloaded, once."""
    found = [next((d / name for d in _LIBRARY_DIRS if (d / name).exists()), None) for name in _PRELOADED]
    libraries = [str(path) for path in found if path is not None]
    if libraries and "LD_PRELOAD" not in os.environ:
        os.environ["LD_PRELOAD"] = ":".join(libraries)
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.peers.run_vllm", *sys.argv[1:]])


class VllmRunner:
    """vLLM's ``LLM`` with as many adapter slots as adapters are loaded, so that none is ever evicted."""

    def __init__(self, work: Work) -> None:
        from vllm import LLM

        self._work = work
        options: dict[str, object] = {}
        if work.num_loaded:
            options = {
                "enable_lora": True,
                "max_loras": work.num_loaded,
                "max_cpu_loras": work.num_loaded,
                "max_lora_rank": work.lora_rank,
            }
        self._llm = LLM(
            model=work.model,
            dtype="bfloat16",
            skip_tokenizer_init=True,
            max_model_len=work.max_tokens,
            max_num_seqs=work.max_batch,
            enable_prefix_caching=False,
            disable_log_stats=False,
            seed=0,
            **options,
            **work.settings,
        )

    def run(self, requests: list[Request], num_output_tokens: int) -> Outcome:
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        adapters = self._work.adapters
        loras = None
        if self._work.num_loaded:
            loras = [
                None
                if request.adapter is None
                else LoRARequest(adapters[request.adapter].name, request.adapter + 1, adapters[request.adapter].path)
                for request in requests
            ]
        sampling = SamplingParams(temperature=0.0, max_tokens=num_output_tokens, ignore_eos=True, detokenize=False)
        outputs = self._llm.generate(
            [{"prompt_token_ids": request.prompt} for request in requests],
            sampling,
            lora_request=loras,
            use_tqdm=False,
        )
        offset_s = time.perf_counter() - time.monotonic()  # its time stamps are on the monotonic clock
        return Outcome(
            token_ids=[list(output.outputs[0].token_ids) for output in outputs],
            first_token_s=[output.metrics.first_token_ts + offset_s for output in outputs],
            finish_s=[output.metrics.last_token_ts + offset_s for output in outputs],
        )

    def versions(self) -> dict[str, str]:
        names = ("vllm-cpu", "transformers", "torch")
        versions = {name: importlib.metadata.version(name) for name in names}
        preloaded = [Path(path).name for path in os.environ.get("LD_PRELOAD", "").split(":")]
        return {**versions, "preloaded": " ".join(preloaded)}


if __name__ == "__main__":
    for _name, _value in _ENVIRONMENT.items():
        os.environ.setdefault(_name, _value)
    _restart_with_preloads()
    main(VllmRunner)
