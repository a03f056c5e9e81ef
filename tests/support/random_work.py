"""Random work for a tiny engine: requests of every kind that come, go and are aborted while others run."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pomona.core.ids import RequestId
from pomona.core.request import SamplingParams
from support.runner import TinyEngine

VOCAB_SIZE = 131
"""Of ``models.make_checkpoint``."""


def random_sampling(chance: random.Random) -> SamplingParams:
    max_tokens = chance.randrange(1, 30)
    changes: list[dict[str, Any]] = [
        {},
        {},
        {"temperature": 1.0, "seed": chance.randrange(100)},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "seed": chance.randrange(100)},
        {"stop_token_ids": tuple(chance.sample(range(VOCAB_SIZE), 12))},
        {"stop_token_ids": tuple(chance.sample(range(VOCAB_SIZE), 40)), "min_tokens": min(6, max_tokens)},
        {"logprobs": 2},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5},
        {"logit_bias": ((5, 3.0), (9, -3.0))},
        {"prompt_logprobs": 1},
    ]
    return SamplingParams(**{"temperature": 0.0, "max_tokens": max_tokens, **chance.choice(changes)})


def play(engine: TinyEngine, adapter_paths: Sequence[Path], seed: int) -> dict[RequestId, list[int]]:
    """Arrivals at random times, a third of them with a prefix in common, some aborted after some tokens; the tokens of
    those that were not."""
    chance = random.Random(seed)
    adapter_ids = [None, *(engine.load_adapter(path) for path in adapter_paths)]
    shared = tuple(chance.randrange(VOCAB_SIZE) for _ in range(24))
    doomed: dict[RequestId, int] = {}
    for _ in range(16):
        tail = tuple(chance.randrange(VOCAB_SIZE) for _ in range(chance.randrange(1, 40)))
        prompt = shared + tail if chance.random() < 0.4 else tail
        request_id = engine.add(prompt, random_sampling(chance), chance.choice(adapter_ids))
        if chance.random() < 0.2:
            doomed[request_id] = chance.randrange(1, 6)
        for _ in range(chance.randrange(0, 4)):
            engine.step()
            for name, num_tokens in doomed.items():
                if len(engine.tokens(name)) >= num_tokens:
                    engine.engine.abort(name)
    engine.run()
    return {name: engine.tokens(name) for name in engine.outputs if name not in doomed}
