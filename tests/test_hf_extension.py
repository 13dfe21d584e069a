"""`hf extensions install`, with the real client; only the repository is here instead of there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

extensions = pytest.importorskip("huggingface_hub.cli.extensions")
ROOT = Path(__file__).resolve().parent.parent


def test_the_script_that_hf_looks_for_is_declared() -> None:
    tomllib = pytest.importorskip("tomllib")
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts[extensions._get_executable_name("gemma-fold")] == scripts["gemma-fold"]


@pytest.mark.slow  # an environment is made
def test_hf_installs_and_runs_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    archive = tmp_path / "hf-gemma-fold.zip"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "gemma_fold"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    names = [name for name in listed if (ROOT / name).is_file()]
    code = "import sys, zipfile; z = zipfile.ZipFile(sys.argv[1], 'w'); " + (
        "[z.write(n, 'hf-gemma-fold-main/' + n) for n in sys.argv[2:]]"
    )
    files = [*names, "pyproject.toml", "README.md", "LICENSE"]
    subprocess.run([sys.executable, "-c", code, archive, *files], cwd=ROOT, check=True)
    real = subprocess.run

    def from_here(command: Any, **options: Any) -> Any:
        """pip with the archive in place of its address, as an outer machine would send it."""
        local = [archive if str(part).endswith("HEAD.zip") else part for part in command]
        return real(local, **options)

    def absent(*_: Any, **__: Any) -> Any:
        raise OSError("no network")

    monkeypatch.setattr(extensions.subprocess, "run", from_here)
    monkeypatch.setattr(extensions, "_github_request", absent)
    monkeypatch.setattr(extensions, "EXTENSIONS_ROOT", tmp_path / "extensions")
    monkeypatch.setattr(extensions.constants, "HF_HUB_DISABLE_UPDATE_CHECK", True)
    extensions._install_extension(owner="org", repo_name="hf-gemma-fold", short_name="gemma-fold")
    for arguments, words in (
        (["gemma-fold", "--version"], "gemma-fold 0."),
        (["gemma-fold", "rules", "gemma3_text"], "gemma3_text"),
    ):
        capfd.readouterr()
        assert extensions.dispatch_unknown_top_level_extension(arguments, set()) == 0
        assert words in capfd.readouterr().out
    assert extensions.dispatch_unknown_top_level_extension(["gemma-fold", "inspekt"], set()) == 2
    assert "(see hf gemma-fold --help)" in capfd.readouterr().err
