"""Hooks for MkDocs: pages that live outside docs/, and links that work in the repository and on the site alike."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {  # file of the repository -> page of the site
    "README.md": "index.md",
    "README.zh.md": "index.zh.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "benchmarks/RESULTS.md": "benchmarks.md",
}
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)]*)?\))")
MERMAID = re.compile(r"^```mermaid\n.*?^```\n", re.MULTILINE | re.DOTALL)


@event_priority(100)  # before the plugin that sorts pages by language
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that live outside docs/."""
    for name, page in PAGES.items():
        if files.get_file_from_path(page) is None:
            text = (ROOT / name).read_text(encoding="utf-8")
            files.append(File.generated(config, page, content=_with_site_links(text, Path(name).parent)))
    return files


def on_page_markdown(markdown: str, page: object, config: MkDocsConfig, files: Files) -> str:
    """Point links that leave docs/ to the pages of the site."""
    # A browser needs a script of 3 MB to draw Mermaid: the site shows the list that the diagram illustrates.
    return MERMAID.sub("", _with_site_links(markdown, Path("docs")))


def _with_site_links(markdown: str, folder: Path) -> str:
    """Rewrite the links of a page that is in `folder` of the repository."""

    def rewritten(match: re.Match[str]) -> str:
        target = match[2]
        if "://" in target:
            return match[0]
        name = (ROOT / folder / target).resolve()
        if not name.is_relative_to(ROOT):
            return match[0]
        path = name.relative_to(ROOT).as_posix()
        return f"{match[1]}{PAGES.get(path, path.removeprefix('docs/'))}{match[3]}"

    return LINK.sub(rewritten, markdown)
