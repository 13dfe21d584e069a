"""Compiles CUDA C++ with NVRTC and launches it: no compiler is needed on the machine.

NVRTC and the driver's launch calls come with torch's own CUDA dependencies (`cuda-bindings`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import torch

#: Bytes of dynamic shared memory that a block may ask for.
MOST_SHARED = 200 * 1024


class ProgramError(RuntimeError):
    """NVRTC or the driver refused; the message says which call and why."""


def _checked(result: tuple[Any, ...]) -> Any:
    status, *values = result
    if int(status) != 0:
        raise ProgramError(f"{status.name} ({type(status).__name__})")
    return values[0] if values else None


@dataclass(frozen=True, slots=True)
class Kernel:
    """One compiled kernel on the current device."""

    function: Any
    config: Any
    most_blocks: int  # that are on the GPU together

    name: str

    def launch(self, blocks: int, arguments: int, stream: int) -> None:
        """Starts `blocks` blocks on `stream`; ``arguments`` is the address of the pointer array."""
        from cuda.bindings import driver

        self.config.gridDimX = blocks
        self.config.hStream = stream
        (status,) = driver.cuLaunchKernelEx(self.config, self.function, arguments, 0)
        if status:
            raise ProgramError(f"launching the kernel {self.name} failed: {status.name}")


@cache
def _source(path: str) -> bytes:
    return files(__package__).joinpath(path).read_bytes()


def compiled(
    source: str, capability: tuple[int, int], defines: tuple[tuple[str, int], ...]
) -> bytes:
    """A cubin of a ``.cu`` of this package, without fused multiply-adds: bits are a contract.

    Raises:
        ProgramError: NVRTC refuses it.
    """
    from cuda.bindings import nvrtc

    program = _checked(nvrtc.nvrtcCreateProgram(_source(source), source.encode(), 0, [], []))
    options = [
        f"--gpu-architecture=sm_{capability[0]}{capability[1]}".encode(),
        b"--std=c++17",
        b"--fmad=false",
        b"--device-as-default-execution-space",
        *(f"-D{name}={value}".encode() for name, value in defines),
    ]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if int(status) != 0:
        log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
        _checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise ProgramError(f"{source} does not compile: {log.decode()[:500]}")
    cubin: bytes = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
    _checked(nvrtc.nvrtcGetCUBIN(program, cubin))
    return cubin


@cache
def _module(device: int, source: str, defines: tuple[tuple[str, int], ...]) -> Any:
    from cuda.bindings import driver

    cubin = compiled(source, torch.cuda.get_device_capability(device), defines)
    return _checked(driver.cuModuleLoadData(cubin))


def load(
    device: int, source: str, name: str, defines: Mapping[str, int], threads: int, shared: int = 0
) -> Kernel:
    """The kernel `name` of `source` on CUDA device `device`, compiled with `defines`.

    Compiled modules are kept for the life of the process.

    Args:
        device: its index.
        source: a ``.cu``, relative to this package.
        name: of an ``extern "C"`` kernel.
        defines: macros.
        threads: of a block.
        shared: bytes of dynamic shared memory of a block.

    Raises:
        ProgramError: NVRTC or the driver refuses.
    """
    from cuda.bindings import driver

    with torch.cuda.device(device):
        torch.cuda.current_stream()  # makes the context, which loading needs
        module = _module(device, source, tuple(sorted(defines.items())))
        function = _checked(driver.cuModuleGetFunction(module, name.encode()))
        if shared:
            most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _checked(driver.cuFuncSetAttribute(function, most, MOST_SHARED))
        per_sm = _checked(
            driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(function, threads, shared)
        )
    properties = torch.cuda.get_device_properties(device)
    config = driver.CUlaunchConfig()
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.gridDimY = config.gridDimZ = 1
    config.sharedMemBytes = shared
    if properties.major >= 9:
        attribute = driver.CUlaunchAttribute()
        attribute.id = (
            driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        )
        attribute.value.programmaticStreamSerializationAllowed = 1
        config.attrs, config.numAttrs = [attribute], 1
    return Kernel(function, config, per_sm * properties.multi_processor_count, name)
