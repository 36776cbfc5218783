"""What must not be in any tracked file: package indexes, and paths that exist on one machine only."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Written in pieces, so that this file does not contain what it looks for.
FORBIDDEN = re.compile(
    "|".join(
        [
            r"pypi\." + "org",
            "python" + "hosted",
            r"(?:registry\.npm" + "js|deb\\.deb" + "ian)",
            "--(?:extra-)?" + "index-url",
            r"(?<![\w.}~])/(?:root|work|farm|Users|tmp|var/folders)" + r"/\w",
            r"(?<![\w.}~])/home/(?!molmo2\b)" + r"\w",
        ]
    )
)


def tracked_files() -> list[Path]:
    """Files that git tracks, or would with the next `git add`."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in names.split("\0") if name and (ROOT / name).is_file()]


def offences(text: str) -> list[str]:
    return [
        f"{number}: {line.strip()[:120]}" for number, line in enumerate(text.splitlines(), 1) if FORBIDDEN.search(line)
    ]


def test_no_index_and_no_path_of_one_machine_is_in_a_tracked_file() -> None:
    files = tracked_files()
    assert len(files) > 100, "git listed next to nothing"
    found = []
    for path in files:
        try:
            found += [f"{path.relative_to(ROOT)}:{line}" for line in offences(path.read_text())]
        except UnicodeDecodeError:
            continue  # pictures and the like
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "pip install --index" + "-url https://mirror/simple torch",
        "https://py" + "pi.org/simple",
        "see '/" + "root/project/file'",
        "cd /" + "home/somebody/project",
        "open('/" + "tmp/x.json')",
    ],
)
def test_the_rule_sees(line: str) -> None:
    assert offences(line)


@pytest.mark.parametrize(
    "line",
    ["WORKDIR /home/molmo2", "mountPath: /tmp", "https://github.com/a/work/b", "s3://bucket/tmp/x", "runs/tmp/x"],
)
def test_the_rule_does_not_see(line: str) -> None:
    assert not offences(line)
