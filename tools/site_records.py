"""MkDocs hook: the records and items that the results link to lie on the site, too.

In the repository, pages in `docs/results` link to `../../paper/...`; on the site that folder lies
beside `results`.
"""

from pathlib import Path
from typing import Any

PAPER = Path(__file__).parents[1] / "paper"


def on_files(files: Any, config: Any) -> Any:
    """Add the items and records to the site's files."""
    from mkdocs.structure.files import File

    for path in sorted([*PAPER.glob("items/*.toml"), *PAPER.glob("results/*.jsonl")]):
        name = f"paper/{path.relative_to(PAPER).as_posix()}"
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links into the repository's `paper` folder lead to the site's."""
    if page.file.src_uri.startswith("results/"):
        return markdown.replace("](../../paper/", "](../paper/")
    return markdown
