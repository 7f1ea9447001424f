"""A hook of mkdocs: links from the documentation to files of the repository.

On a code host such a link opens the file. The site has no such page, so there the link becomes its
text; a link to a file that does not exist is an error.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

LINK = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)#]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Replace links that leave the folder of the documentation."""
    docs = Path(config.docs_dir).resolve()
    folder = (docs / page.file.src_path).parent

    def replace(match: re.Match[str]) -> str:
        target = (folder / match[2]).resolve()
        if docs in target.parents:
            return match[0]
        if not target.exists():
            raise ValueError(f"{page.file.src_path}: {match[2]} does not exist")
        return match[1]

    return LINK.sub(replace, markdown)
