"""Prompts of a given length: token ids where the server can tell us some, words otherwise.

Token ids are drawn at random from those of common words, so that prompts have exactly the asked length and share no
beginning that a prefix cache could keep. What was really processed is always taken from the server's usage.
"""

import json
import random
from dataclasses import dataclass

from pomona.bench.client import ServerClient

WORDS = (
    "apple bread cloud dance earth flame grass house island juice kettle lemon music night ocean paper queen river "
    "stone table uncle valley water yellow zebra autumn bridge candle doctor engine flower garden hammer insect jacket "
    "kitchen ladder market needle orange pencil rabbit silver ticket umbrella village winter basket camera desert "
    "about before circle double every father green happy inside joint kind little mother never other people quick "
    "right simple three until very where young zero"
)


@dataclass(frozen=True, slots=True)
class PromptSource:
    """Makes prompts. ``token_ids`` is empty when prompts are words."""

    token_ids: tuple[int, ...] = ()

    @property
    def is_exact(self) -> bool:
        """True if prompts have exactly the asked number of tokens."""
        return bool(self.token_ids)

    def draw(self, rng: random.Random, num_tokens: int) -> list[int] | str:
        """Return one prompt: ``num_tokens`` token ids, or as many words."""
        if self.token_ids:
            return rng.choices(self.token_ids, k=num_tokens)
        return " ".join(rng.choices(WORDS.split(), k=num_tokens))


async def find_prompt_source(client: ServerClient, model: str) -> PromptSource:
    """Return token ids if the server has /tokenize and takes ids as a prompt at their face value, else words."""
    token_ids = await client.tokenize(model, WORDS)
    # The first id may be a begin-of-sequence mark, which belongs at a beginning only.
    source = PromptSource(tuple(sorted(set(token_ids[1:]))) if token_ids else ())
    if not source.is_exact:
        return source
    probe = source.draw(random.Random(0), 7)
    outcome = await client.stream_completion(completion_body(model, probe, max_tokens=1))
    is_taken = outcome.usage is not None and outcome.usage.prompt_tokens == len(probe)
    return source if is_taken else PromptSource()


def completion_body(model: str, prompt: list[int] | str, max_tokens: int, **options: object) -> bytes:
    """Return the JSON of a streaming /v1/completions request that asks for usage."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        **options,
    }
    return json.dumps(body, separators=(",", ":")).encode()
