"""Tandem serves DeepSeek-R1 from pairs of prefill and decode groups of SGLang workers."""

__version__ = "0.1.0"
