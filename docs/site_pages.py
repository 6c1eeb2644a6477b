"""A hook of mkdocs: pages that live elsewhere in the repository, and links between them and docs/."""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
# File of the repository -> page of the site.
ELSEWHERE = {
    "README.md": "index.md",
    "recipes/README.md": "recipes.md",
    "qlora_recipes/standins/README.md": "standins.md",
    "qlora_recipes/base/upstream.md": "upstream.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}
_LINK = re.compile(r"(\[[^\]]*\])\((?!\w+:)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of `ELSEWHERE`."""
    for source, page in ELSEWHERE.items():
        content = link_pages((ROOT / source).read_text(encoding="utf-8"), source)
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: object, **_: object) -> str:
    """Point the links of a page in docs/ at the site."""
    source = page.file.src_uri  # type: ignore[attr-defined]
    return markdown if source in ELSEWHERE.values() else link_pages(markdown, f"docs/{source}")


def link_pages(markdown: str, source: str) -> str:
    """Return a file's text with its links to other files as links between pages; code has no page and is named only."""

    def link(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if not (ROOT / path).exists():
            raise PluginError(f"{source} links to {target}, which does not exist")
        page = ELSEWHERE.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if page is None:
            return text[1:-1]
        here = posixpath.dirname(ELSEWHERE.get(source, source.removeprefix("docs/")))
        return f"{text}({posixpath.relpath(page, here or '.')}{anchor})"

    return _LINK.sub(link, markdown)
