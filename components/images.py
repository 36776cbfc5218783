"""The one table of container images.  Compiled into the pipeline; the local runner ignores it.

`images/digests.lock` (`name sha256:...` per line, written when images are pushed) pins an image by digest; without a
line there, the tag stands.  MOLMO2_IMAGE_REGISTRY chooses another registry when the pipeline is compiled.
"""

import os
from pathlib import Path

_REGISTRY = os.environ.get("MOLMO2_IMAGE_REGISTRY", "ghcr.io/molmo2core")
_TAG = "0.1.0"
_LOCK = Path(__file__).parents[1] / "images" / "digests.lock"


def _pinned() -> dict[str, str]:
    lines = _LOCK.read_text().splitlines() if _LOCK.is_file() else []
    return dict(line.split() for line in lines if line.strip() and not line.startswith("#"))


IMAGES = {
    name: f"{_REGISTRY}/{name}:{_TAG}" + (f"@{_pinned()[name]}" if name in _pinned() else "")
    for name in ("core", "data", "train", "eval")
}
