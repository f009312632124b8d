"""Before a release is built: make the links of README.md absolute, and add [project.urls] to pyproject.toml.

PyPI resolves no relative links. GitHub sets the variables that name the repository and the tag.
"""

import os
import re
from pathlib import Path

REPOSITORY = f"{os.environ['GITHUB_SERVER_URL']}/{os.environ['GITHUB_REPOSITORY']}"
TAG = os.environ["GITHUB_REF_NAME"]
LINK = re.compile(r"(!?)(\[[^\]]*\]\()(?!https?:|#)([^)]+\))")


def main() -> None:
    """Change both files in place."""
    readme = Path("README.md")
    text = readme.read_text(encoding="utf-8")
    text = LINK.sub(lambda m: f"{m[1]}{m[2]}{REPOSITORY}/{'raw' if m[1] else 'blob'}/{TAG}/{m[3]}", text)
    readme.write_text(text, encoding="utf-8")
    project = Path("pyproject.toml")
    urls = {
        "Homepage": REPOSITORY,
        "Documentation": f"{REPOSITORY}/tree/{TAG}/docs",
        "Changelog": f"{REPOSITORY}/blob/{TAG}/CHANGELOG.md",
        "Issues": f"{REPOSITORY}/issues",
    }
    table = "\n[project.urls]\n" + "".join(f'{name} = "{url}"\n' for name, url in urls.items())
    project.write_text(project.read_text(encoding="utf-8") + table, encoding="utf-8")


if __name__ == "__main__":
    main()
