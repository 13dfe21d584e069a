"""The life of an all-reduce: created from a process group, used by operators, destroyed."""

from __future__ import annotations

import importlib.util
import logging
import socket
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from gemma_fold.ops import checks
from gemma_fold.ops.collectives import tuning
from gemma_fold.ops.collectives.exchange import Capacity, PeerExchange, capacity

_log = logging.getLogger("gemma_fold")
_workspaces: dict[str, AllReduceWorkspace] = {}


class AllReduceWorkspace:
    """What the all-reduce operators need of a process group; one for each group.

    On GPUs of one host that reach each other's memory it holds a buffer on every rank and the
    operators run fused. Anywhere else (CPU, several hosts, more than 8 ranks) they run the
    library's all-reduce, then the fused norm; `explain()` says which and why, and so does one log
    line.

    Creation and `destroy` are collective: every rank of the group calls them, in the same order as
    its other collectives. Operators are collective too, with equal shapes and dtypes on all ranks;
    `debug=True` checks that before every call, at the cost of a host round trip, and raises
    ValueError. One workspace serves one stream at a time; CUDA graphs may capture its operators,
    without warm-up for rows of `hidden` elements in `dtype`.

    Args:
        group: a torch.distributed process group; None is the default group, or, where
            torch.distributed is not initialised, this process alone.
        hidden: elements of the longest row.
        max_tokens: rows expected at most in one call. Calls of more rows, or of more than
            `tuning.TWO_SHOT_KERNEL_BYTES`, run as several kernels, with the same bits.
        dtype: of the activations.
        device: of the activations; the current CUDA device, or the CPU where there is none.
        name: what a traced graph calls the workspace; unique among the living ones.
        path: "auto"; "portable" for the Triton kernel, which "auto" takes where NVRTC is missing:
            one-shot alone, the same sums, norms whose last bit may differ; "library" to never use
            peer memory.
        timeout: seconds a kernel waits for another rank before it stops the process with a message
            that names the rank.
        one_shot_bytes: overrides `tuning.ONE_SHOT_BYTES` for this group.

    Raises ValueError for arguments that make no sense, or a name that is taken.
    """

    def __init__(
        self,
        group: Any = None,
        *,
        hidden: int,
        max_tokens: int = 2048,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | int | None = None,
        name: str | None = None,
        path: str = "auto",
        timeout: float = 600.0,
        one_shot_bytes: int | None = None,
        debug: bool = False,
    ) -> None:
        if path not in ("auto", "portable", "library"):
            raise ValueError(f"path must be auto, portable or library, not {path!r}")
        if dtype not in checks.ACTIVATION_DTYPES:
            raise ValueError(f"dtype must be bfloat16, float16 or float32, not {dtype}")
        if not 1 <= hidden <= checks.MAX_HIDDEN or max_tokens < 1 or timeout <= 0:
            raise ValueError(
                f"hidden must be 1 to {checks.MAX_HIDDEN}, max_tokens and timeout positive"
            )
        self.group, self.world = _resolve(group)
        self.device = _device(device)
        self.debug = debug
        self.name = name or _unused_name(self.group)
        if self.name in _workspaces:
            raise ValueError(
                f"there is a workspace named {self.name!r}; destroy it or name another"
            )
        pitch = -(-hidden * dtype.itemsize // tuning.VECTOR_BYTES) * tuning.VECTOR_BYTES
        threshold = tuning.ONE_SHOT_BYTES.get(self.world, 0)
        threshold = threshold if one_shot_bytes is None else one_shot_bytes
        self._exchange: PeerExchange | None = None
        self._reason, portable = self._obstacle(path)
        threshold = 1 << 62 if portable else threshold
        self._size = capacity(self.world, max_tokens, pitch, threshold)
        if self.world > 1 and self._reason is None:
            self._exchange = PeerExchange(self.group, self.device, self._size, timeout, portable)
            if hidden * dtype.itemsize == pitch:
                self._exchange.prepare(hidden, dtype)
        self._unfit: set[tuple[int, torch.dtype]] = set()
        self.destroyed = False
        _workspaces[self.name] = self
        _log.info("%s", self.explain())

    @property
    def fused(self) -> bool:
        """Whether rows that fit run in one kernel over peer memory."""
        return self._exchange is not None

    @property
    def memory(self) -> int:
        """Bytes held on this rank's device."""
        return self._size.bytes if self._exchange is not None else 0

    @property
    def size(self) -> Capacity:
        """How the buffer is laid out."""
        return self._size

    def explain(self) -> str:
        """One line: which path the operators take, and why."""
        head = f"all-reduce workspace {self.name!r} of {self.world} ranks on {self.device}: "
        if self.world == 1:
            return head + "nothing to reduce"
        if self._exchange is None:
            return head + f"the library's all-reduce, then the fused norm, because {self._reason}"
        kind = " by Triton" if self._exchange.portable else ""
        one = self._size.one_shot_rows
        two = f", two-shot up to {self._size.two_shot_rows}" if self._size.two_shot_rows else ""
        return (
            head + f"fused over peer memory{kind}, one-shot up to {one} rows{two}; "
            f"{self.memory / 2**20:.1f} MiB on each rank"
        )

    def exchange_for(self, x: Tensor) -> PeerExchange | None:
        """What runs rows like those of `x` fused, or None where the library reduces them."""
        exchange = self._exchange
        if exchange is None or x.device != self.device:
            return None
        if exchange.takes(x):
            return exchange
        if (x.shape[-1], x.dtype) not in self._unfit:
            self._unfit.add((x.shape[-1], x.dtype))
            _log.warning(
                "all-reduce workspace %r: rows of %d %s do not fit (whole 16-byte vectors, at most "
                "%d bytes); the library reduces them",
                self.name, x.shape[-1], x.dtype, self._size.pitch,
            )  # fmt: skip
        return None

    def reduce_by_library(self, x: Tensor) -> Tensor:
        """The sum over all ranks, a new tensor in the dtype of `x`, without peer memory.

        On CPU it is summed in fp32 and rounded once. NCCL sums in the dtype of `x`, in its own
        order: the fastest it has, and its bits.
        """
        if self.world == 1:
            return x.clone()
        import torch.distributed as dist

        exact = not x.is_cuda and x.dtype != torch.float32
        total = x.float() if exact else x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.group)
        return total.to(x.dtype)

    def check_agreement(self, operator: str, x: Tensor) -> None:
        """In debug mode: ValueError on every rank unless all make the same call. Collective."""
        if not self.debug or self.world == 1 or _capturing(x):
            return
        import torch.distributed as dist

        calls: list[Any] = [None] * self.world
        dist.all_gather_object(calls, (operator, list(x.shape), str(x.dtype)), group=self.group)
        if any(call != calls[0] for call in calls):
            listed = "; ".join(f"rank {r}: {op} {s} {d}" for r, (op, s, d) in enumerate(calls))
            raise ValueError(f"the ranks of {self.name!r} disagree about a call: {listed}")

    def destroy(self) -> None:
        """Free the buffers after all queued work. Collective; a second call does nothing."""
        if self.destroyed:
            return
        self.destroyed = True
        _workspaces.pop(self.name, None)
        if self._exchange is not None:
            self._exchange.close()
            self._exchange = None

    def __enter__(self) -> AllReduceWorkspace:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # After an error the other ranks may be anywhere: waiting for them could take for ever.
        if error is None:
            self.destroy()
        else:
            self.destroyed = True
            _workspaces.pop(self.name, None)

    def _obstacle(self, path: str) -> tuple[str | None, bool]:
        """Why peer memory cannot be used, or None; and whether NVRTC cannot. Collective.

        The same on all ranks.
        """
        if self.world == 1:
            return None, False
        import torch.distributed as dist

        portable = path == "portable" or not _has_nvrtc()
        mine = (socket.gethostname(), _local_obstacle(self.device, self.world, path), portable)
        every: list[Any] = [None] * self.world
        dist.all_gather_object(every, mine, group=self.group)
        for rank, (_, reason, _) in enumerate(every):
            if reason is not None:
                return f"{reason} (rank {rank})", False
        hosts = {host for host, _, _ in every}
        reason = f"the ranks are on {len(hosts)} hosts" if len(hosts) > 1 else None
        return reason, any(portable for _, _, portable in every)


def find(workspace: str) -> AllReduceWorkspace:
    """The living workspace of that name. Raises ValueError where there is none."""
    found = _workspaces.get(workspace)
    if found is None:
        raise ValueError(
            f"there is no all-reduce workspace {workspace!r}: it was destroyed, or never made here"
        )
    return found


def _resolve(group: Any) -> tuple[Any, int]:
    """The group meant, and how many ranks it has."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        if group is not None:
            raise ValueError("the process group is gone: torch.distributed is not initialised")
        return None, 1
    group = dist.group.WORLD if group is None else group
    return group, dist.get_world_size(group)


def _device(device: torch.device | str | int | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if str(found) == "cuda" else found


def _unused_name(group: Any) -> str:
    base = getattr(group, "group_name", "default")
    number = 0
    while f"{base}:{number}" in _workspaces:
        number += 1
    return f"{base}:{number}"


def _local_obstacle(device: torch.device, world: int, path: str) -> str | None:
    if path == "library":
        return "it was asked for"
    if device.type != "cuda":
        return f"the device is {device.type}"
    if torch.version.hip is not None:
        return "this is not an NVIDIA GPU"
    if world > tuning.MAX_WORLD:
        return f"there are more than {tuning.MAX_WORLD} ranks"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    for other in range(torch.cuda.device_count()):
        if other != device.index and not torch.cuda.can_device_access_peer(device.index, other):
            return f"GPU {device.index} cannot reach the memory of GPU {other}"
    return None


def _has_nvrtc() -> bool:
    names = ("cuda", "cuda.bindings")
    return all(importlib.util.find_spec(name) is not None for name in names)


def _capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
