"""Every command, killed or failed at every one of its file system calls."""
