"""How long work reports that it moves on; the command line draws it, the library stays silent."""


class Progress:
    """Receives events of one run. This one ignores them: subclass to show them."""

    def start(self, total_bytes: int, files: int) -> None:
        """Work begins: `total_bytes` in `files` weight files and others."""

    def file(self, name: str, number: int) -> None:
        """File `number`, counted from 1, begins."""

    def advance(self, n_bytes: int) -> None:
        """`n_bytes` more have been written."""

    def finish(self) -> None:
        """Nothing more will come."""
