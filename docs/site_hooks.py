"""Hooks for MkDocs: pages that live outside docs/, and links that work in the repository and on the site alike."""

import atexit
import re
import shutil
import tempfile
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority

DOCS = Path(__file__).parent
ROOT = DOCS.parent
PAGES = {  # file of the repository -> page of the site
    "README.md": "index.md",
    "README.zh.md": "index.zh.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "benchmarks/RESULTS.md": "benchmarks.md",
}
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)]*)?\))")
LANGUAGE = re.compile(r"(?: ·\s+)?\[(?:中文|English)\]\([^)]*\.md\)")  # the site has a menu for it
MERMAID = re.compile(r"^```mermaid\n.*?^```\n", re.MULTILINE | re.DOTALL)


@event_priority(100)  # before the plugin that sorts pages by language
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Build from a copy of docs/ that also has the pages that live outside of it."""
    if Path(config.docs_dir) == DOCS:
        staging = tempfile.mkdtemp(prefix="llmcli-docs")
        atexit.register(shutil.rmtree, staging, ignore_errors=True)
        shutil.copytree(DOCS, staging, dirs_exist_ok=True)
        for name, page in PAGES.items():
            text = _with_site_links((ROOT / name).read_text(encoding="utf-8"), Path(name).parent)
            head = "---\nhide:\n  - navigation\n---\n\n" if page.startswith("index") else ""
            Path(staging, page).write_text(head + text, encoding="utf-8")
        config.docs_dir = staging
    return config


def on_page_markdown(markdown: str, **_: object) -> str:
    """Point links that leave docs/ to the pages of the site."""
    # Browsers need a script of 3 MB to draw Mermaid. The site shows the list that the diagram illustrates instead.
    return MERMAID.sub("", _with_site_links(markdown, Path("docs")))


def _with_site_links(markdown: str, folder: Path) -> str:
    """Return a page of `folder` in the repository with the links of the site."""

    def rewritten(match: re.Match[str]) -> str:
        target = match[2]
        if "://" in target:
            return match[0]
        name = (ROOT / folder / target).resolve()
        if not name.is_relative_to(ROOT):
            return match[0]
        path = name.relative_to(ROOT).as_posix()
        return f"{match[1]}{PAGES.get(path, path.removeprefix('docs/'))}{match[3]}"

    return LINK.sub(rewritten, LANGUAGE.sub("", markdown))
