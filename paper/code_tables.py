"""Tables of what the code itself says: refusals, settings, and which method works with what."""

import ast
import inspect


def codes() -> str:
    """Every code that the gate refuses by."""
    from fedgen_edge.network.gate import CODES

    rows = [f"| `{code}` | {meaning} |" for code, meaning in CODES.items()]
    return "\n".join(["| code | what it means |", "|---|---|", *rows])


def settings() -> str:
    """The settings of `federation.toml`: each field's default, and the sentence under it."""
    from fedgen_edge.deploy.settings import DeploymentSettings

    body = ast.parse(inspect.getsource(DeploymentSettings)).body[0]
    assert isinstance(body, ast.ClassDef)
    rows = ["| setting | default | what it is |", "|---|---|---|"]
    for field, docstring in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(docstring, ast.Expr):
            value = "" if field.value is None else f"`{ast.unparse(field.value)}`"
            sentence = " ".join(ast.literal_eval(docstring.value).split())
            rows.append(f"| `{ast.unparse(field.target)}` | {value} | {sentence} |")
    return "\n".join(rows)


def matrix() -> str:
    """Which method works with what."""
    from fedgen_edge.cli.compatibility import format_mark, make_legend, make_rows

    columns = make_legend()
    out = [f"| method | {' | '.join(columns)} |", f"|---|{':-:|' * len(columns)}"]
    for name, marks in make_rows().items():
        out.append(f"| {name} | {' | '.join(format_mark(k, marks[k]) for k in columns)} |")
    return "\n".join([*out, "", *(f"- **{name}**: {about}" for name, about in columns.items())])
