"""Pomona: many LoRA adapters of one base model, for many tenants, in one batch."""

__version__ = "0.1.0"
