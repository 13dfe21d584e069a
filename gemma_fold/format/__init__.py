"""Format 1: what a folded checkpoint holds, and the arithmetic between it and its original."""
