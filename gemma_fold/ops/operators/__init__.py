"""The operators, a file each: what it computes, how its kernel runs, and its public functions."""
