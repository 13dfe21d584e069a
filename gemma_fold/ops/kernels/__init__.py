"""The Triton kernels; :mod:`gemma_fold.ops.launch` starts them."""
