"""Use the operators in a torch model of your own, and see that they say what the formula says.

    python examples/own_model.py

The block below has the norms of Gemma 2 and 3: one before and one after its feed-forward, whose
output is added to what came in; the next block begins with a norm again. `rms_norm_add_rms_norm`
does norm, add and norm in one kernel. On a CPU the same calls run as plain torch, so the model can
be written and tested there; on a GPU they are Triton kernels. Autograd works on both.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from gemma_fold import ops

HIDDEN, EPS = 256, 1e-6


def folded(w: Tensor) -> nn.Parameter:
    """gamma = 1 + w, once, in float32, in which it stays whatever the model computes in."""
    return nn.Parameter(1.0 + w.float())


class Block(nn.Module):
    """Feed-forward of a Gemma layer: pre-norm, projections, post-norm, add, next block's norm."""

    def __init__(self, w: dict[str, Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, 4 * HIDDEN, bias=False, dtype=dtype)
        self.down = nn.Linear(4 * HIDDEN, HIDDEN, bias=False, dtype=dtype)
        self.pre, self.post, self.following = (folded(w[n]) for n in ("pre", "post", "following"))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The next block's input, normed, and what it adds its own output to."""
        out = self.down(gelu(self.up(ops.rms_norm(x, self.pre, EPS)), approximate="tanh"))
        return ops.rms_norm_add_rms_norm(out, x, self.post, self.following, EPS, EPS)


def stock_norm(x: Tensor, w: Tensor) -> Tensor:
    """As the models in transformers write it: 1 + w anew every time."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + EPS) * (1.0 + w.float())).to(x)


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    w = {name: torch.randn(HIDDEN).bfloat16().to(device) for name in ("pre", "post", "following")}
    block = Block(w, torch.bfloat16).to(device)
    x = torch.randn(8, HIDDEN, device=device).bfloat16()

    got, residual = block(x)
    out = block.down(gelu(block.up(stock_norm(x, w["pre"])), approximate="tanh"))
    want_residual = x + stock_norm(out, w["post"])
    want = stock_norm(want_residual, w["following"])
    same = torch.equal(got, want) and torch.equal(residual, want_residual)
    print(f"on {device}: {'the same bits' if same else 'other bits'} as with 1 + w every time")
    print(f"largest difference: {(got - want).abs().max().item():.3g}")

    got.float().sum().backward()
    print(f"gradient of gamma: {block.post.grad.dtype}, {tuple(block.post.grad.shape)}")


if __name__ == "__main__":
    main()
