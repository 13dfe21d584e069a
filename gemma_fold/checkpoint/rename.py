"""Renames that replace nothing, and the exchange of two folders in one step.

Linux has both as flags of renameat2(2). Where the C library, the kernel or the file system lacks
them, `rename_new` falls back to rename(2) after a check: rename(2) itself never replaces a folder
that holds anything, nor a file or a link by a folder. There is no fallback for the exchange.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Callable
from functools import cache

from gemma_fold.checkpoint.folder import Folder

_NOREPLACE, _EXCHANGE = 1, 2
# What a kernel, a system call filter or a file system without the flags answers.
_UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM})


def rename_new(source: Folder, name: str, target: Folder, new_name: str) -> None:
    """Rename `name` in `source`, most often a folder, to `new_name` in `target`.

    Raises:
        FileExistsError: something other than an empty folder is there; it was not touched.
        OSError: the rename failed.
    """
    try:
        if _renameat2(source, name, target, new_name, _NOREPLACE):
            return
    except FileExistsError:
        pass
    moved = source.status(name)
    if moved is not None and not stat.S_ISDIR(moved.st_mode):
        _link_new(source, name, target, new_name)
        return
    status = target.status(new_name)
    if status is not None and not stat.S_ISDIR(status.st_mode):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), new_name)
    try:
        os.rename(name, new_name, src_dir_fd=source.descriptor, dst_dir_fd=target.descriptor)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), new_name) from None
        raise


def _link_new(source: Folder, name: str, target: Folder, new_name: str) -> None:
    """Rename a file or a link, which rename(2) would put in the place of another."""
    os.link(
        name,
        new_name,
        src_dir_fd=source.descriptor,
        dst_dir_fd=target.descriptor,
        follow_symlinks=False,
    )
    os.unlink(name, dir_fd=source.descriptor)


def exchange(source: Folder, name: str, target: Folder, other: str) -> bool:
    """Swap two names in one step; False if this system cannot, and then nothing moved."""
    return _renameat2(source, name, target, other, _EXCHANGE)


def _renameat2(source: Folder, name: str, target: Folder, other: str, flag: int) -> bool:
    call = _libc_renameat2()
    if call is None:
        return False
    old, new = os.fsencode(name), os.fsencode(other)
    while call(source.descriptor, old, target.descriptor, new, flag) != 0:
        code = ctypes.get_errno()
        if code in _UNSUPPORTED:
            return False
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code), name, None, other)
    return True


@cache
def _libc_renameat2() -> Callable[..., int] | None:
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return None
    function.argtypes = [
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.c_uint,
    ]
    function.restype = ctypes.c_int
    call: Callable[..., int] = function
    return call
