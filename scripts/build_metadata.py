"""Completes the package's metadata when it is built: the README, and the repository's address.

    CRISLIT_REPOSITORY=https://github.com/OWNER/crislit python -m build

A package index shows the README without the files of the repository. With CRISLIT_REPOSITORY, its
links and images lead to the files of the release's tag; without, they stay as they are.
"""

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

RELATIVE_LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>(?![a-z]+:|#)[^)\s]+)\)")


def absolute_links(text: str, repository: str, version: str) -> str:
    """Make links to files of the repository absolute, as GitHub names them."""

    def replace(match: re.Match[str]) -> str:
        kind = "raw" if match["image"] else "blob"
        address = f"{repository}/{kind}/v{version}/{match['target']}"
        return f"{match['image']}[{match['text']}]({address})"

    return RELATIVE_LINK.sub(replace, text)


class BuildMetadata(MetadataHookInterface):
    """Sets ``readme`` and ``urls`` of the project, which pyproject.toml declares dynamic."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add both to the metadata."""
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        urls = {"Paper": "https://arxiv.org/abs/2111.15174"}
        if repository := os.environ.get("CRISLIT_REPOSITORY", "").rstrip("/"):
            text = absolute_links(text, repository, metadata["version"])
            urls["Repository"] = repository
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
        metadata["urls"] = urls
