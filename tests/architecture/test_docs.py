"""Pages name tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAMED = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")


def named_tests(page: str) -> list[tuple[str, str]]:
    """(file, function or '') of each test that `page` names."""
    return NAMED.findall(page)


def test_every_test_that_a_page_names_exists() -> None:
    """Would catch a page that promises a test which was renamed or removed."""
    named = {pair for page in ROOT.glob("docs/*.md") for pair in named_tests(page.read_text())}
    assert len(named) > 20
    for path, function in sorted(named):
        assert f"def {function}(" in (ROOT / path).read_text() if function else (ROOT / path).is_file(), (
            path,
            function,
        )


def test_the_rule_sees_both_forms() -> None:
    page = "see `tests/unit/test_a.py` and `tests/unit/test_b.py::test_c`, but not `molmo2core/a.py`"
    assert named_tests(page) == [("tests/unit/test_a.py", ""), ("tests/unit/test_b.py", "test_c")]
