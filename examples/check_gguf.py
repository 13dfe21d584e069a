"""Say which norms of a GGUF file are wrong, and how.

    python examples/check_gguf.py gemma-3-270m-Q4_K_M.gguf google/gemma-3-270m

llama.cpp stores 1 + w where the original stores w. A converter that adds the 1 twice, not at all,
or in 16 bits leaves a file that loads all the same. Only headers and norms are read, on both sides,
so this takes moments for a model of any size; `gemma-fold check` is the same as a command, and
docs/check.md lists what it finds in files of llama.cpp, MLX, AWQ and others. Exit code 1 if wrong.
"""

import sys
from collections import Counter

import gemma_fold


def main(file: str, original: str) -> int:
    report = gemma_fold.check(file, against=original)
    for finding, count in Counter(norm.finding.value for norm in report.norms).items():
        print(f"{count:4} norms: {finding}")
    for norm in report.norms:
        if not norm.right:
            print(f"{norm.name}: {norm.finding.value}, {norm.changed} of {norm.elements} weights")
    print(report.verdict.line)
    return 0 if report.verdict.right else 1


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
