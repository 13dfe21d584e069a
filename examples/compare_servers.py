"""Ask two running servers the same, and say whether their models answer alike.

    VLLM_PLUGINS= vllm serve google/gemma-3-27b-it --port 8000     # as the engine comes
    vllm serve gemma-3-27b-it-folded --port 8001                   # folded, with gemma-fold
    python examples/compare_servers.py http://127.0.0.1:8000 http://127.0.0.1:8001

Works with any two servers that give log-probabilities of a prompt in OpenAI's completions: vLLM
and SGLang do. `gemma-fold diff A B` is the same as a command; docs/diff.md says how it decides.
Exit code 1 if they differ, so that a deployment can wait for it.
"""

import sys

from gemma_fold import DiffOptions, diff


def main(stock: str, folded: str) -> int:
    report = diff(stock, folded, DiffOptions(new_tokens=16))
    assert report.outputs is not None  # they are all that servers tell
    stats, floor = report.outputs.stats, report.outputs.floor
    print(f"same most likely token: {stats.same_top:.1%} of {stats.positions:,} positions")
    print(f"mean KL divergence: {stats.kl_ab.mean:.3g} nats")
    if floor is not None:
        print(f"the same of the first server, asked twice: {floor.kl_ab.mean:.3g} nats")
    print(report.verdict.line)
    return 0 if report.verdict.same else 1


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
