"""Norm kernels for fp32 gamma: plain torch references, Triton kernels, torch.library operators.

Nothing here knows about checkpoints. Callers use :mod:`gemma_fold.ops`.
"""
