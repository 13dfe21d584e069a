"""Outputs: who is asked (transformers, vLLM, a server), and the statistics of what they answer."""
