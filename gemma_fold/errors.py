"""Everything gemma-fold raises on purpose.

    GemmaFoldError                 exit code 2
    ├── UsageError                 2   arguments that make no sense together
    ├── CheckpointError            2   the input is damaged, or not a checkpoint
    │   └── AlreadyFoldedError     2   folding it again would add the offset twice
    ├── UnsupportedModelError      3   no rule covers this model's norms
    │   └── NothingToFoldError     3   this family already stores plain gamma
    └── HostError                  2   disk, permissions, a missing extra or engine

A check that finds a difference raises nothing: its result has it, and the command exits with 1.

Each message is one line: what failed, why, and what to do about it.
"""


class GemmaFoldError(Exception):
    """Base of all deliberate errors; `exit_code` is what the command line returns."""

    exit_code = 2


class UsageError(GemmaFoldError):
    """The arguments do not make sense, alone or together."""


class CheckpointError(GemmaFoldError):
    """The input is damaged, incomplete, or not a safetensors checkpoint."""


class AlreadyFoldedError(CheckpointError):
    """The input already holds gamma; folding it again would be silently wrong."""


class UnsupportedModelError(GemmaFoldError):
    """No rule covers this model."""

    exit_code = 3


class NothingToFoldError(UnsupportedModelError):
    """The model family stores plain gamma, so there is nothing to do."""


class HostError(GemmaFoldError):
    """The machine is in the way: disk space, permissions, a package that is not installed."""


def first_line(error: BaseException, most: int = 200) -> str:
    """The text of another library's exception, for a message of ours; its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:most]


#: The extra that brings a package, by the name the package is imported by.
_EXTRAS = {"torch": "torch", "transformers": "transformers"}


def missing_extra(what: str, error: ModuleNotFoundError) -> HostError | None:
    """That `what` needs an extra that is not installed; None where another module is missing."""
    package = (error.name or "").partition(".")[0]
    if package not in _EXTRAS:
        return None
    return HostError(f"{what} needs {package}: pip install 'gemma-fold[{_EXTRAS[package]}]'")
