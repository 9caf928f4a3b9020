"""The page of settings, made of the fields of the settings' classes as the site is built.

A hook of mkdocs (`mkdocs.yml`). It reads the source and imports nothing of the package.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

SOURCE = Path(__file__).parents[1] / "src" / "fedgen_edge"
PAGE = "reference/settings.md"
HEAD = """# Settings

A recipe is a TOML file with a table for each heading below. It names only what differs from the
defaults. On the command line, a setting has the name `table.field`, such as `--training.lr 1e-3`;
`fedgen run --help` prints the same sentences. A default of none means that the setting is left out.
"""
DEPLOYMENT = """
## federation.toml

A deployment's server reads this file when it starts ([many machines](../guides/many-machines.md)).
"""
SITE = """
## site.toml

Each kit of a deployment has this file.
"""


class SettingField(NamedTuple):
    """One field of a settings class."""

    name: str
    annotation: str
    default: str
    about: str


def make_page(source: Path = SOURCE) -> str:
    """The page, as Markdown."""
    classes = _read_classes(source / "config.py")
    top = list(_iter_fields(classes["Settings"]))
    parts = [HEAD, _make_table([f for f in top if f.annotation not in classes], "")]
    for field in top:
        if field.annotation in classes:
            node = classes[field.annotation]
            about = (ast.get_docstring(node) or "").strip()
            parts += [
                f"\n## {field.name}\n\n{about}\n",
                _make_table(_iter_fields(node), field.name),
            ]
    deployment = _read_classes(source / "deploy" / "settings.py")
    parts += [DEPLOYMENT, _make_table(_iter_fields(deployment["DeploymentSettings"]), "")]
    parts += [SITE, _make_table(_iter_fields(deployment["SiteSettings"]), "")]
    return "\n".join(parts)


def _read_classes(path: Path) -> dict[str, ast.ClassDef]:
    tree = ast.parse(path.read_text("utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def _iter_fields(node: ast.ClassDef) -> Iterator[SettingField]:
    """Its fields, each with the string below it."""
    for i, field in enumerate(node.body):
        if isinstance(field, ast.AnnAssign):
            after = node.body[i + 1] if i + 1 < len(node.body) else None
            about = ast.literal_eval(after.value) if isinstance(after, ast.Expr) else ""
            default = "" if field.value is None else ast.unparse(field.value)
            yield SettingField(
                ast.unparse(field.target),
                ast.unparse(field.annotation),
                _describe_default(default),
                " ".join(str(about).split()),
            )


def _describe_default(default: str) -> str:
    names = {"None": "none", "()": "empty", "field(default_factory=dict)": "empty", "": "required"}
    return names.get(default, f"`{default}`").replace("'", '"')


def _make_table(settings: Iterator[SettingField] | list[SettingField], table: str) -> str:
    rows = ["| setting | default | what it does |", "|---|---|---|"]
    for field in settings:
        name = f"{table}.{field.name}" if table else field.name
        choices = _describe_choices(field.annotation)
        about = f"{field.about} {choices}".strip().replace("|", "\\|")
        rows.append(f"| `{name}` | {field.default} | {about} |")
    return "\n".join(rows) + "\n"


def _describe_choices(annotation: str) -> str:
    """The values of a setting that has a few."""
    node = ast.parse(annotation, mode="eval").body
    literals = [n for n in ast.walk(node) if isinstance(n, ast.Subscript)]
    for literal in literals:
        if ast.unparse(literal.value) == "Literal":
            values = ast.literal_eval(literal.slice)
            values = values if isinstance(values, tuple) else (values,)
            return "One of " + ", ".join(f"`{value}`" for value in values) + "."
    return ""


def on_files(files: Any, config: Any) -> Any:
    """Add the page to the site."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, PAGE, content=make_page()))
    return files
