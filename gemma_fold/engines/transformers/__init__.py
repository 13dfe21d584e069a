"""Hugging Face transformers loads, runs and saves folded checkpoints."""
