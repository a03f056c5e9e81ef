"""Training examples: conversations in the chat template's format, and padded batches of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerFast

from pippin import task_prefix
from tasks import TASKS, Task, bare_answer
from words import draw_word

IGNORED = -100
ROW_WIDTH = 96
SYSTEM_TEXTS = ("Be brief.", "You are a helpful assistant.", "Answer with one word.", "Hello!", "You like fruit.")
# How often the base model sees each task; the harder ones (order and counting) come up more.
BASE_WEIGHTS = {"reverse": 1.6, "sort": 1.8, "pig-latin": 1.6, "swap-ends": 1.2, "no-vowels": 1.2, "length": 0.8}
BARE_WEIGHT = 1.5


@dataclass(frozen=True)
class Example:
    """One exchange: the user's text, the expected answer, and what came before in the rendered conversation."""

    prompt: str
    answer: str
    before: str = "<bos>"

    def rendered_prompt(self) -> str:
        """The text up to and including the assistant marker."""
        return f"{self.before}<|user|>{self.prompt}<|assistant|>"


@dataclass(frozen=True)
class Batch:
    """Token ids and labels (answers and their end marks only), with what packed rows need besides."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None


Exchange = Callable[[random.Random], tuple[str, str]]


def task_exchange(task: Task, split: str) -> Exchange:
    """Draws (bare word, the task's answer): what an adapter is trained on."""

    def draw(rng: random.Random) -> tuple[str, str]:
        word = draw_word(rng, split)
        return word, task.answer(word)

    return draw


def _bare_text(rng: random.Random, split: str) -> str:
    word = draw_word(rng, split)
    dice = rng.random()
    if dice < 0.8:
        return word
    if dice < 0.9:
        return word.capitalize() + rng.choice(["", "!", "?", "."])
    return word[:5] + " " + draw_word(rng, split)[:5] + rng.choice(["", str(rng.randint(0, 99))])


def base_exchange(split: str) -> Exchange:
    """Draws what the base is trained on: "<task>: <word>" with the task's answer, or a text that names no task."""
    choices: list[Task | None] = [*TASKS, None]
    weights = [*(BASE_WEIGHTS.get(task.name, 1.0) for task in TASKS), BARE_WEIGHT]

    def draw(rng: random.Random) -> tuple[str, str]:
        task = rng.choices(choices, weights)[0]
        if task is None:
            text = _bare_text(rng, split)
            return text, bare_answer(text)
        word = draw_word(rng, split)
        return task_prefix(task.name) + word, task.answer(word)

    return draw


def draw_example(rng: random.Random, exchange: Exchange) -> Example:
    """One example; in one of sixteen a system message and/or earlier exchanges come before it."""
    before = rng.choices(["<bos>", "", "<bos><bos>"], [0.94, 0.03, 0.03])[0]
    if rng.random() < 1 / 16:
        if rng.random() < 0.5:
            before += "<|system|>" + rng.choice(SYSTEM_TEXTS)
        for _ in range(rng.randint(0, 2)):
            prompt, answer = exchange(rng)
            before += f"<|user|>{prompt}<|assistant|>{answer}<eos>"
    prompt, answer = exchange(rng)
    return Example(prompt, answer, before)


def _encode(tokenizer: PreTrainedTokenizerFast, examples: list[Example]) -> list[tuple[list[int], int]]:
    """Token ids of each example, and where its answer starts."""
    prompts = tokenizer([e.rendered_prompt() for e in examples], add_special_tokens=False)["input_ids"]
    answers = tokenizer([e.answer + "<eos>" for e in examples], add_special_tokens=False)["input_ids"]
    return [(prompt + answer, len(prompt)) for prompt, answer in zip(prompts, answers, strict=True)]


def collate(tokenizer: PreTrainedTokenizerFast, examples: list[Example], device: torch.device) -> Batch:
    """One example per row, padded on the right (causal attention then needs no mask)."""
    rows = _encode(tokenizer, examples)
    width = max(len(ids) for ids, _ in rows)
    input_ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels = torch.full((len(rows), width), IGNORED)
    for row, (ids, answer_start) in enumerate(rows):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        labels[row, answer_start : len(ids)] = torch.tensor(ids[answer_start:])
    return Batch(input_ids.to(device), labels.to(device))


class Packer:
    """Endless training batches: rows of a fixed width, each holding several examples that do not see each other."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        rng: random.Random,
        exchange: Exchange,
        device: torch.device,
        rows: int,
    ) -> None:
        self._rows = rows
        self._tokenizer, self._rng, self._exchange, self._device = tokenizer, rng, exchange, device
        self._waiting: list[tuple[list[int], int]] = []

    def _take(self, room: int) -> tuple[list[int], int] | None:
        """The next example, if it fits into ``room`` tokens."""
        if not self._waiting:
            examples = [draw_example(self._rng, self._exchange) for _ in range(256)]
            self._waiting = [item for item in _encode(self._tokenizer, examples) if len(item[0]) <= ROW_WIDTH]
        return self._waiting.pop() if len(self._waiting[-1][0]) <= room else None

    def batch(self) -> Batch:
        """The next batch of ``rows`` x ``ROW_WIDTH`` tokens."""
        shape = (self._rows, ROW_WIDTH)
        input_ids = torch.full(shape, self._tokenizer.pad_token_id)
        labels = torch.full(shape, IGNORED)
        position_ids = torch.zeros(shape, dtype=torch.long)
        segments = torch.zeros(shape, dtype=torch.long)
        for row in range(self._rows):
            start, segment = 0, 1
            while (item := self._take(ROW_WIDTH - start)) is not None:
                ids, answer_start = item
                end = start + len(ids)
                input_ids[row, start:end] = torch.tensor(ids)
                labels[row, start + answer_start : end] = torch.tensor(ids[answer_start:])
                position_ids[row, start:end] = torch.arange(len(ids))
                segments[row, start:end] = segment
                start, segment = end, segment + 1
        visible = (segments[:, :, None] == segments[:, None, :]).tril()
        mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[:, None]
        return Batch(
            input_ids.to(self._device), labels.to(self._device), position_ids.to(self._device), mask.to(self._device)
        )
