"""The command line: arguments in, one call into the library, text or JSON out."""

from __future__ import annotations

import os
import sys

import click

from gemma_fold.cli.app import group, program
from gemma_fold.cli.output import complain
from gemma_fold.errors import GemmaFoldError, first_line

EXIT_INTERRUPTED = 130
#: Where it is set, an error that nobody expected is shown with where it happened.
TRACEBACK = "GEMMA_FOLD_TRACEBACK"


def open_standard_streams() -> None:
    """Take the descriptors of standard streams that are closed.

    Otherwise the next file that is opened, a weight file, becomes where libraries print their
    warnings.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # opens the lowest free number
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115  (open until the end)
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


def main() -> None:
    """Run the command line; every deliberate error is one line and its exit code."""
    from gemma_fold.cli import commands  # noqa: F401  (which adds them to the group)

    open_standard_streams()
    try:
        status = group.main(prog_name=program(), standalone_mode=False)
        sys.exit(status if isinstance(status, int) else 0)
    except GemmaFoldError as error:
        _fail(str(error), error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else program()
        message = error.format_message().rstrip(".")
        _fail(f"{message[:1].lower()}{message[1:]} (see {path} --help)", error.exit_code)
    except click.ClickException as error:
        _fail(error.format_message(), error.exit_code)
    except (KeyboardInterrupt, click.Abort) as error:
        _fail(str(error.__cause__ or error) or "interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output went away, as `head` does: nothing is wrong, nothing to flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}; check the path, permissions and disk", 2)
    except MemoryError:
        _fail("this machine has too little memory for it; close other programs", 2)
    except Exception as error:
        if os.environ.get(TRACEBACK):
            raise
        _fail(
            f"unexpected {type(error).__name__}: {first_line(error)}; this is a bug: "
            f"please report it, with what {TRACEBACK}=1 shows",
            2,
        )


def _fail(message: str, exit_code: int) -> None:
    complain(message)
    sys.exit(exit_code)
