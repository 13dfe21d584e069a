"""Progress callbacks: the command line draws a bar, the library stays silent."""


class Progress:
    """Receives events of one run. This one ignores them: subclass to show them."""

    def start(self, total_bytes: int, files: int) -> None:
        """Work begins: `total_bytes` in `files` weight files and others."""

    def start_steps(self, steps: int, files: int) -> None:
        """The same for work that is counted in `steps` rather than bytes."""

    def waiting(self, what: str) -> None:
        """From here on `what` goes on, which is not counted; the next start ends it."""

    def file(self, name: str, number: int) -> None:
        """File `number`, counted from 1, begins."""

    def advance(self, n_bytes: int) -> None:
        """`n_bytes` more have been written, or so many steps taken."""

    def finish(self) -> None:
        """Nothing more will come."""
