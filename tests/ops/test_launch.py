"""Which of Triton's launchers are called past its public interface."""

from __future__ import annotations

from typing import Any

import pytest

triton = pytest.importorskip("triton")

from triton.backends.amd.driver import HIPLauncher  # noqa: E402
from triton.backends.nvidia.driver import CudaLauncher  # noqa: E402

from gemma_fold.ops.launch import takes_addresses  # noqa: E402


class Known:
    def __call__(self, gridX, gridY, gridZ, stream, function, *args):  # type: ignore[no-untyped-def]
        ...


class OneMore:
    def __call__(self, gridX, gridY, gridZ, stream, function, cluster, *args):  # type: ignore[no-untyped-def]
        ...


class Packed:
    def __call__(self, gridX, gridY, gridZ, stream, function, args):  # type: ignore[no-untyped-def]
        ...


class Silent:
    __call__ = print


@pytest.mark.parametrize("launcher", [CudaLauncher, HIPLauncher])
def test_the_installed_triton_is_known(launcher: type) -> None:
    assert takes_addresses(launcher, triton.__version__)


@pytest.mark.parametrize(
    ("launcher", "version", "known"),
    [
        (Known, "3.6.0", True),
        (Known, "3.9.0+git1234", True),
        (Known, "3.5.1", False),
        (Known, "3.10.0", False),
        (Known, "4.0.0", False),
        (Known, "nightly", False),
        (OneMore, "3.6.0", False),
        (Packed, "3.6.0", False),
        (Silent, "3.6.0", False),
    ],
)
def test_others_launch_as_triton_documents(launcher: Any, version: str, known: bool) -> None:
    assert takes_addresses(launcher, version) is known
