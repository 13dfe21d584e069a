"""Engines that run folded checkpoints: transformers, vLLM and SGLang, a package each.

What they share: `mode` (GEMMA_FOLD, and the report of what was fused), `known_code` (the decoders
of vLLM and SGLang), `weights` (a gamma and the w it was made of), `workspace` (for all-reduces),
`checks` (the config and plug-in of a folded checkpoint), `serve`, `doctor`, and `attach`, which
finds in an engine's code what can be fused.
"""
