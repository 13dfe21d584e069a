"""Compiles ``kernel.cu`` with NVRTC and launches it: no compiler is needed on the machine.

NVRTC and the driver's launch calls come with torch's own CUDA dependencies (`cuda-bindings`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import torch


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

    def launch(self, blocks: int, arguments: int, stream: int) -> None:
        """Starts `blocks` blocks on `stream`; ``arguments`` is the address of the pointer array."""
        from cuda.bindings import driver

        self.config.gridDimX = blocks
        self.config.hStream = stream
        (status,) = driver.cuLaunchKernelEx(self.config, self.function, arguments, 0)
        if status:
            raise ProgramError(f"launching the all-reduce kernel failed: {status.name}")


@cache
def _source() -> bytes:
    return files(__package__).joinpath("kernel.cu").read_bytes()


def _compile(capability: tuple[int, int], defines: tuple[tuple[str, int], ...]) -> bytes:
    """A cubin of ``kernel.cu``, without fused multiply-adds: bits are a contract."""
    from cuda.bindings import nvrtc

    program = _checked(nvrtc.nvrtcCreateProgram(_source(), b"all_reduce.cu", 0, [], []))
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
        raise ProgramError(f"the all-reduce kernel does not compile: {log.decode()[:500]}")
    cubin: bytes = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
    _checked(nvrtc.nvrtcGetCUBIN(program, cubin))
    return cubin


@cache
def _module(device: int, defines: tuple[tuple[str, int], ...]) -> Any:
    from cuda.bindings import driver

    cubin = _compile(torch.cuda.get_device_capability(device), defines)
    return _checked(driver.cuModuleLoadData(cubin))


def load(device: int, name: str, defines: Mapping[str, int], threads: int) -> Kernel:
    """The kernel `name` on CUDA device `device`, compiled with `defines`.

    Raises ProgramError; compiled modules are kept for the life of the process.
    """
    from cuda.bindings import driver

    with torch.cuda.device(device):
        torch.cuda.current_stream()  # makes the context, which loading needs
        module = _module(device, tuple(sorted(defines.items())))
        function = _checked(driver.cuModuleGetFunction(module, name.encode()))
        per_sm = _checked(driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(function, threads, 0))
    properties = torch.cuda.get_device_properties(device)
    config = driver.CUlaunchConfig()
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.gridDimY = config.gridDimZ = 1
    if properties.major >= 9:
        attribute = driver.CUlaunchAttribute()
        attribute.id = (
            driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        )
        attribute.value.programmaticStreamSerializationAllowed = 1
        config.attrs, config.numAttrs = [attribute], 1
    return Kernel(function, config, per_sm * properties.multi_processor_count)


def arguments_type(world: int) -> type[ctypes.Structure]:
    """The struct Args of ``kernel.cu`` for `world` ranks."""
    pointers = ("x", "residual", "post_gamma", "pre_gamma", "y", "total", "scale", "uses", "failed")
    fields: list[tuple[str, Any]] = [("buffers", ctypes.c_uint64 * world)]
    fields += [(name, ctypes.c_void_p) for name in pointers]
    fields += [("x_stride", ctypes.c_int64), ("residual_stride", ctypes.c_int64)]
    fields += [("pitch", ctypes.c_uint64), ("timeout_ns", ctypes.c_uint64)]
    fields += [(name, ctypes.c_int32) for name in ("rows", "capacity", "rank")]
    fields += [(name, ctypes.c_float) for name in ("post_eps", "pre_eps")]
    return type("Args", (ctypes.Structure,), {"_fields_": fields})
