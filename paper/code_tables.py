"""Tables of what the code itself says: refusals, and which method works with what."""


def codes() -> str:
    """Every code that the gate refuses by."""
    from fedgen_edge.network.gate import CODES

    rows = [f"| `{code}` | {meaning} |" for code, meaning in CODES.items()]
    return "\n".join(["| code | what it means |", "|---|---|", *rows])


def matrix() -> str:
    """Which method works with what."""
    from fedgen_edge.cli.compatibility import format_mark, make_legend, make_rows

    columns = make_legend()
    out = [f"| method | {' | '.join(columns)} |", f"|---|{':-:|' * len(columns)}"]
    for name, marks in make_rows().items():
        out.append(f"| {name} | {' | '.join(format_mark(k, marks[k]) for k in columns)} |")
    return "\n".join([*out, "", *(f"- **{name}**: {about}" for name, about in columns.items())])
