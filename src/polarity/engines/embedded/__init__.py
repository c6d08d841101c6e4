"""The embedded engine: one process, CPU or one GPU, any Hugging Face causal LM directory."""

from polarity.engines.embedded.trainer import prepare, train, train_step

__all__ = ["prepare", "train", "train_step"]
