"""All-reduce across the ranks of tensor parallelism, with the norms that follow it in one kernel.

``kernel.cu`` and ``exchange.py`` hold the protocol over peer memory; ``workspace.py`` takes that or
the library's all-reduce.
"""
