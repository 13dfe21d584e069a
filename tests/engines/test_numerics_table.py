"""The table of docs/numerics.md, by cell: where a folded norm is the original, and where not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from torch import Tensor

import gemma_fold
from gemma_fold.commands.convert import convert
from gemma_fold.engines.transformers.norms import FoldedNorm, gain_name
from gemma_fold.rules import NORM_CLASSES

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = {"bf16": BF16, "fp16": FP16, "fp32": FP32}
#: Stored as, and computed in: the cells in which the original rounds w before it adds.
DIFFERENT = {("fp16", "bf16"), ("fp32", "bf16"), ("fp32", "fp16")}
STORAGE = ("nemotron", "muse_spark", "videoprism", "moonshine_streaming")  # where they add
FAMILIES = tuple(
    f for f in ("gemma3_text", "gemma2", "qwen3_next", *STORAGE) if f in tiny.available()
)
#: Beyond fp16: the one way in which bf16 weights differ at fp16 compute.
LARGE = 70_000.0


def wild(shape: torch.Size, seed: int) -> Tensor:
    """Float32 weights in fp16's range, of all sizes and both signs, with -1 and the zeros."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10.0 ** torch.empty(shape).uniform_(-5, 1.5, generator=generator)
    w = sizes * torch.randn(shape, generator=generator).sign()
    w[:4] = torch.tensor([-1.0, 0.0, -0.0, 60.0])
    return w


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`{family}-{stored}` and `{family}-{stored}-folded`; `large-...` has weights beyond fp16."""
    root = tmp_path_factory.mktemp("checkpoints")
    kinds = [(family, family, 0.0) for family in FAMILIES] + [("large", "gemma3_text", LARGE)]
    for name, family, large in kinds:
        for stored, dtype in DTYPES.items():
            model = tiny.build(family)
            with torch.no_grad():
                for seed, norm in enumerate(norms_of(model)):
                    weight = norm.get_parameter(gain_name(norm))
                    weight.copy_(wild(weight.shape, seed))
                    weight[5] = large or weight[5]
            model.to(dtype).save_pretrained(root / f"{name}-{stored}")
            convert(root / f"{name}-{stored}", root / f"{name}-{stored}-folded")
    return root


def norms_of(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The zero-centred norms of an original model: those that its folded twin replaces."""
    for module in model.modules():
        if type(module).__name__ in NORM_CLASSES:
            yield module


def differing(root: Path, name: str, family: str, compute: torch.dtype) -> int:
    """Values that differ between every norm of the original and of the folded checkpoint."""
    cls = getattr(transformers, tiny.CLASSES[family])
    model = cls.from_pretrained(root / name, dtype=compute)
    folded = gemma_fold.load(root / f"{name}-folded", dtype=compute)
    originals = dict(model.named_modules())
    count = compared = 0
    for where, norm in folded.named_modules():
        if not isinstance(norm, FoldedNorm):
            continue
        generator = torch.Generator().manual_seed(compared)
        x = (3 * torch.randn(64, norm.gain.shape[0], generator=generator)).to(compute)
        with torch.no_grad():
            expected, found = originals[where](x), norm(x)
        assert found.dtype == expected.dtype == compute
        # Bits, so that zeros of either sign count; NaN where both overflow to it is the same.
        same = (found == expected) & (found.signbit() == expected.signbit())
        count += int((~(same | (found.isnan() & expected.isnan()))).sum())
        compared += 1
    assert compared >= 5
    return count


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("compute", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
def test_every_cell_of_the_table(checkpoints: Path, family: str, stored: str, compute: str) -> None:
    count = differing(checkpoints, f"{family}-{stored}", family, DTYPES[compute])
    assert (count > 0) == ((stored, compute) in DIFFERENT), count


@pytest.mark.parametrize("compute", DTYPES)
def test_bf16_weights_beyond_fp16_differ_at_fp16_alone(checkpoints: Path, compute: str) -> None:
    assert (differing(checkpoints, "large-bf16", "gemma3_text", DTYPES[compute]) > 0) == (
        compute == "fp16"
    )


def test_which_bf16_weights_change_in_fp16() -> None:
    """All 65,280 finite ones: gamma of w against gamma of w rounded to fp16."""
    w = torch.arange(1 << 16).to(torch.int32).to(torch.int16).view(BF16).float()
    w = w[w.isfinite()]
    exact, rounded = 1 + w, 1 + w.to(FP16).float()
    changed = exact != rounded
    large = w.abs() >= 65_536
    assert len(w) == 65_280 and int(large.sum()) == 28_672 and bool(changed[large].all())
    small = changed & ~large
    assert int(small.sum()) == 192 and w[small].min() > 6e-8 and w[small].max() < 3.75e-6
    assert (exact - rounded)[small].abs().max() == torch.finfo(FP32).eps  # one ulp of gamma


@pytest.mark.parametrize(
    ("stored", "warned"),
    [
        ("bf16", None),
        ("fp16", "float16 norms: at bfloat16 compute results differ"),
        ("fp32", "float32 norms: at bfloat16 or float16 compute results differ"),
    ],
)
def test_convert_warns_of_just_the_cells_that_differ(
    checkpoints: Path, tmp_path: Path, stored: str, warned: str | None
) -> None:
    source = checkpoints / f"gemma3_text-{stored}"
    report = convert(source, tmp_path / "out", dry_run=True)
    assert [w.partition(",")[0] for w in report.warnings] == ([warned] if warned else [])
