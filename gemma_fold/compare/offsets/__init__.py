"""Where the +1 of every norm is: what a format expects of it, and what a file holds.

expectation  which tensors are norms of which kind, and what each format should hold
match        one norm beside the original's: exact patterns first, fits after them
evidence     a file alone: what its own bits and statistics say
verdict      the whole file, in one sentence
"""
