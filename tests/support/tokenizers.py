"""Small real tokenizers, trained on a few lines, as checkpoints have them: a folder of JSON files."""

import functools
import json
from pathlib import Path
from typing import Any, Literal

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = (
    "The quick brown fox jumps over the lazy dog. ",
    "Many adapters of one base model share one batch. ",
    "héllo wörld, naïve café, 你好世界, こんにちは, привет, 🙂🙃👩‍👩‍👧‍👦 ",
    "def add(a: int, b: int) -> int:\n    return a + b\n",
    '0123456789 10 200 3000 {"key": [1, 2, 3]}\n',
) * 8
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
Kind = Literal["byte_level", "sentencepiece"]


def make_tokenizer_files(
    path: Path, vocab_size: int = 512, *, kind: Kind = "byte_level", chat_template: str | None = CHAT_TEMPLATE
) -> Path:
    """Train a tokenizer and write tokenizer.json and tokenizer_config.json into ``path`` (created if need be).

    Args:
        path: folder.
        vocab_size: wanted; at least the alphabet and the special tokens.
        kind: "byte_level" as GPT-2, Llama 3 and Qwen; "sentencepiece" as Llama 2: word marks, byte fallback, BOS.
        chat_template: ChatML by default; None for none.
    """
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.json").write_text(_trained(kind, vocab_size))
    config: dict[str, Any] = {"eos_token": "<|im_end|>", "pad_token": {"content": "<|endoftext|>"}}
    if kind == "sentencepiece":
        config["bos_token"] = "<s>"
    if chat_template is not None:
        config["chat_template"] = chat_template
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@functools.lru_cache
def _trained(kind: Kind, vocab_size: int) -> str:
    backend = _byte_level(vocab_size) if kind == "byte_level" else _sentencepiece(vocab_size)
    return str(backend.to_str())


def _byte_level(vocab_size: int) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def _sentencepiece(vocab_size: int) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size + len(byte_tokens),
        special_tokens=["<unk>", "<s>", *SPECIALS, *byte_tokens],
        limit_alphabet=80,
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    # Byte tokens belong to the vocabulary only; as special tokens they would be found in, and left out of, texts.
    state = json.loads(backend.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
    backend = tokenizers.Tokenizer.from_str(json.dumps(state))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair=None, special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return backend
