"""Engines that run folded checkpoints: transformers, vLLM and SGLang, and what they share."""
