"""Statistics of two sets of next-token logits over the same tokens.

P is side A's distribution, Q side B's. Per position: KL(P||Q), KL(Q||P), the argmax, the k most
likely tokens and the probability of the token that follows in the text. All sums are in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gemma_fold.compare.outputs.results import PERCENTILES, Distribution, Floats, OutputStats

TOP_K = 10
#: Elements a float64 work array may have, some six of which live at a time. 4 MB on the CPU, where
#: larger ones are mapped and zeroed by the kernel each time; 64 MB elsewhere, to keep a GPU busy.
_WORK_ON_CPU, _WORK = 1 << 19, 1 << 23


@dataclass(frozen=True, slots=True)
class Rows:
    """Per-position results of `compare_rows`; each array has one entry a position.

    nll and p are NaN if no token follows; the KLs are NaN if a logit is not finite.
    invalid and unlisted, [positions, 2]: of A and of B, see `OutputStats`.
    """

    kl_ab: Floats
    kl_ba: Floats
    same_top: npt.NDArray[np.bool_]
    overlap: Floats
    differing: npt.NDArray[np.int64]
    max_abs: Floats
    finite: npt.NDArray[np.bool_]
    nll_a: Floats
    nll_b: Floats
    invalid: npt.NDArray[np.bool_]
    unlisted: npt.NDArray[np.bool_]


def compare_rows(a: Tensor, b: Tensor, targets: Tensor) -> Rows:
    """Compare logits row by row.

    a, b: [positions, vocabulary] of any float dtype, on one device. targets: int64 [positions], the
    token that follows, or -1 if none does. Memory stays bounded whatever the number of rows.
    """
    step = max(1, (_WORK_ON_CPU if a.device.type == "cpu" else _WORK) // a.shape[1])
    parts = [
        _compare(a[i : i + step], b[i : i + step], targets[i : i + step])
        for i in range(0, a.shape[0], step)
    ]
    return join(parts)


def join(parts: Sequence[Rows]) -> Rows:
    """The rows of all `parts`, in order."""
    names = Rows.__dataclass_fields__
    return Rows(**{n: np.concatenate([getattr(part, n) for part in parts]) for n in names})


def noisiest(runs: Sequence[tuple[Rows, str]]) -> tuple[Rows, str]:
    """Of one side against itself, run in several ways: the one in which it differs most."""
    return max(runs, key=lambda run: float(np.nan_to_num(run[0].kl_ab).mean()))


def _compare(a: Tensor, b: Tensor, targets: Tensor) -> Rows:
    x = a.double()
    if a.dtype == b.dtype and torch.equal(a, b):
        return _equal_rows(x, targets)
    y = b.double()
    differing = ((x != y) & ~(x.isnan() & y.isnan())).sum(-1)
    # Masked tokens: minus infinity on both sides is agreement, with probability zero.
    masked = (x == -math.inf) & (y == -math.inf)
    invalid = torch.stack((_invalid(x), _invalid(y)), -1)
    finite = ((x.isfinite() & y.isfinite()) | masked).all(-1) & ~invalid.any(-1)
    delta = (y - x).masked_fill_(masked, 0.0)
    p, lse_x = _softmax(x)
    q, lse_y = _softmax(y)
    # KL(P||Q) = sum p (log p - log q) = sum p (x - y) - lse(x) + lse(y), and the reverse likewise.
    kl_ab = lse_y - lse_x - (p * delta).sum(-1)
    kl_ba = lse_x - lse_y + (q * delta).sum(-1)
    k = min(TOP_K, x.shape[-1])
    top_a, top_b = x.topk(k).indices, y.topk(k).indices
    exact = differing == 0

    def divergence(kl: Tensor) -> Floats:
        kl = kl.clamp(min=0).masked_fill(exact, 0.0)
        return _floats(kl.masked_fill(~finite, math.nan))

    return Rows(
        kl_ab=divergence(kl_ab),
        kl_ba=divergence(kl_ba),
        same_top=(x.argmax(-1) == y.argmax(-1)).cpu().numpy(),
        overlap=_floats((top_a[:, :, None] == top_b[:, None, :]).any(-1).double().mean(-1)),
        differing=differing.cpu().numpy(),
        max_abs=_floats(delta.abs().nan_to_num(posinf=math.inf).amax(-1)),
        finite=finite.cpu().numpy(),
        nll_a=_nll(x, lse_x, targets),
        nll_b=_nll(y, lse_y, targets),
        invalid=invalid.cpu().numpy(),
        unlisted=np.zeros((len(x), 2), bool),
    )


def _equal_rows(x: Tensor, targets: Tensor) -> Rows:
    count = x.shape[0]
    zeros = np.zeros(count)
    nll = _nll(x, x.logsumexp(-1), targets)
    invalid = _invalid(x).cpu().numpy()
    return Rows(
        kl_ab=zeros,
        kl_ba=zeros,
        same_top=np.ones(count, bool),
        overlap=np.ones(count),
        differing=np.zeros(count, np.int64),
        max_abs=zeros,
        finite=~invalid,
        nll_a=nll,
        nll_b=nll,
        invalid=np.stack((invalid, invalid), -1),
        unlisted=np.zeros((count, 2), bool),
    )


def _invalid(logits: Tensor) -> Tensor:
    """Rows that are not a distribution: minus infinity masks a token, but not all of them."""
    broken = logits.isnan() | (logits == math.inf)
    return broken.any(-1) | ~logits.isfinite().any(-1)


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities, and the logarithm of the sum of exponentials."""
    highest = logits.amax(-1, keepdim=True)
    weights = (logits - highest).exp_()
    total = weights.sum(-1, keepdim=True)
    return weights.div_(total), (highest + total.log())[:, 0]


def _nll(logits: Tensor, lse: Tensor, targets: Tensor) -> Floats:
    chosen = logits.gather(-1, targets.clamp(min=0)[:, None])[:, 0]
    return _floats((lse - chosen).masked_fill(targets < 0, math.nan))


def summarize(rows: Rows, *, vocabulary: int | None, top_k: int = TOP_K) -> OutputStats:
    """The statistics over all positions."""
    count = rows.kl_ab.size
    scored = ~np.isnan(rows.nll_a) & ~np.isnan(rows.nll_b)
    nll_a, nll_b = rows.nll_a[scored], rows.nll_b[scored]
    listed = ~rows.unlisted.any(-1)
    agree = _mean(rows.same_top[listed].astype(np.float64))
    delta_p = np.exp(-nll_b) - np.exp(-nll_a)
    return OutputStats(
        positions=count,
        scored=int(scored.sum()),
        vocabulary=vocabulary,
        top_k=top_k,
        differing=None if vocabulary is None else int(rows.differing.sum()),
        positions_differing=int(np.count_nonzero(rows.differing)),
        max_abs=float(rows.max_abs.max()),
        kl_ab=distribution(rows.kl_ab),
        kl_ba=distribution(rows.kl_ba),
        same_top=agree,
        same_top_sigma=math.sqrt(agree * (1 - agree) / max(1, listed.sum() - 1)),
        overlap=_mean(rows.overlap[listed]),
        perplexity_a=_exp(_mean(nll_a)),
        perplexity_b=_exp(_mean(nll_b)),
        ln_ratio=_mean(nll_b - nll_a),
        ln_ratio_sigma=_standard_error(nll_b - nll_a),
        delta_p_mean=_mean(delta_p),
        delta_p_rms=math.sqrt(_mean(delta_p**2)),
        non_finite=int(np.count_nonzero(~rows.finite)),
        invalid=_counts(rows.invalid),
        undefined=int(np.count_nonzero(rows.invalid.all(-1))),
        unlisted=_counts(rows.unlisted),
        listed=int(np.count_nonzero(listed)),
    )


def distribution(values: Floats) -> Distribution:
    """Mean, extremes and percentiles, over the numbers among `values`."""
    known = values[~np.isnan(values)]
    if not known.size:
        nan = math.nan
        return Distribution(nan, nan, nan, (nan,) * len(PERCENTILES))
    cuts = np.percentile(known, PERCENTILES)
    return Distribution(
        float(known.mean()), float(known.min()), float(known.max()), tuple(map(float, cuts))
    )


def _floats(values: Tensor) -> Floats:
    return values.double().cpu().numpy()


def _mean(values: Floats) -> float:
    return float(values.mean()) if values.size else math.nan


def _counts(sides: npt.NDArray[np.bool_]) -> tuple[int, int]:
    return int(sides[:, 0].sum()), int(sides[:, 1].sum())


def _exp(value: float) -> float:
    return math.inf if value >= 700 else math.exp(value)


def _standard_error(values: Floats) -> float:
    return float(values.std(ddof=1) / math.sqrt(values.size)) if values.size > 1 else math.nan
