"""All-reduce across the ranks of tensor parallelism, with the norms that follow it in one kernel.

``kernel.cu`` and ``exchange.py`` hold the protocol over peer memory, ``library.py`` what runs where
there is none, and ``workspace.py`` decides between them.
"""
