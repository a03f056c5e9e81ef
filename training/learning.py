"""The optimisation loop and the accuracy measure shared by the base model and the adapters."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from data import IGNORED, Batch, Example, collate


@dataclass(frozen=True)
class Schedule:
    """Steps and learning rate: linear warm-up, then cosine decay to a twentieth."""

    steps: int
    learning_rate: float
    warmup: int
    weight_decay: float = 0.02


def answer_logits(model: LlamaForCausalLM, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and targets at the answer positions only."""
    hidden = model.model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=batch.attention_mask,
        use_cache=False,
    ).last_hidden_state
    targets = batch.labels[:, 1:]
    chosen = targets != IGNORED
    return model.lm_head(hidden[:, :-1][chosen]).float(), targets[chosen]


def fit(
    model: LlamaForCausalLM,
    next_batch: Callable[[], Batch],
    schedule: Schedule,
    on_step: Callable[[int, float], bool],
) -> int:
    """Trains the parameters that require gradients; stops early when ``on_step`` returns True. Returns the steps."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    plain = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": schedule.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=schedule.learning_rate, betas=(0.9, 0.98), fused=True)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.02, total_iters=schedule.warmup)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, schedule.steps - schedule.warmup, schedule.learning_rate / 20
    )
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], [schedule.warmup])
    model.train()
    for step in range(schedule.steps):
        batch = next_batch()
        with torch.autocast(batch.input_ids.device.type, torch.bfloat16):
            logits, targets = answer_logits(model, batch)
        loss = nn.functional.cross_entropy(logits, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(decayed + plain, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if on_step(step + 1, loss.item()):
            return step + 1
    return schedule.steps


@torch.no_grad()
def exact_match(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, examples: Iterable[Example], device: torch.device
) -> float:
    """Share of examples that greedy decoding answers exactly, end mark included.

    One forward pass per batch is enough: greedy decoding yields the expected answer if and only if, after each prefix
    of the expected answer, the most likely token is the next expected one.
    """
    todo = list(examples)
    correct = 0
    was_training = model.training
    model.eval()
    for start in range(0, len(todo), 128):
        batch = collate(tokenizer, todo[start : start + 128], device)
        hidden = model.model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        targets = batch.labels[:, 1:]
        right = (model.lm_head(hidden[:, :-1]).argmax(-1) == targets) | (targets == IGNORED)
        correct += int(right.all(dim=1).sum())
    model.train(was_training)
    return correct / len(todo)


class Progress:
    """Prints one line now and then: step, loss, seconds."""

    def __init__(self, label: str, steps: int, every: int) -> None:
        self._label, self._steps, self._every = label, steps, every
        self._start = time.perf_counter()
        self._loss = 0.0

    def update(self, step: int, loss: float) -> None:
        """Notes one step's loss and prints a line when it is due."""
        self._loss = loss if step == 1 else 0.95 * self._loss + 0.05 * loss
        if step % self._every == 0 or step == self._steps:
            seconds = time.perf_counter() - self._start
            print(f"{self._label}: step {step}/{self._steps}  loss {self._loss:.4f}  {seconds:.0f} s", flush=True)
