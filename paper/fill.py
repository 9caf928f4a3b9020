"""Write measured results into the pages that quote them, between `<!-- results:NAME -->` marks.

    python paper/fill.py

Every number comes from a file under `paper/results` or `benchmarks/results`; settings and codes
come from the code that has them.
"""

import ast
import inspect
import json
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import figures
import kept
import varying
import views
from fedgen_edge import files
from fedgen_edge.errors import FedGenError
from items import ROOT, read, shown

BENCHMARKS = ROOT / "benchmarks" / "results"

PAGES = (
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("results", "deploy", "methods", "backbones")),
)


def _benchmarks(kind: str) -> dict[str, Any]:
    """The results of one benchmark, by its name, with the default backbone's in full."""
    paths = sorted(BENCHMARKS.glob(f"{kind}-*.json"))
    if not paths:
        raise FileNotFoundError(kind)
    names = [p.stem.removeprefix(f"{kind}-") for p in paths]
    names = [re.sub(r"SmolLM2(-135M)?", "SmolLM2-135M-Instruct", name) for name in names]
    return {name: json.loads(p.read_text()) for name, p in zip(names, paths, strict=True)}


def _columns(found: dict[str, Any], rows: dict[str, Callable[[Any], object]]) -> list[str]:
    """A column a result, a row a number of it."""
    out = [f"| | {' | '.join(found)} |", "|---" * (len(found) + 1) + "|"]
    return out + [
        f"| {name} | {' | '.join(str(get(r)) for r in found.values())} |"
        for name, get in rows.items()
    ]


def speed() -> str:
    """The benchmark's ratios, a column a backbone."""
    found = _benchmarks("speed")
    rows = {
        "hardware": lambda r: f"{r['hardware']}, {r['threads']} threads",
        "a step": lambda r: r["batch"],
        "stacked over bare, same batch per client": lambda r: r[
            "stacked_over_bare_same_batch_per_client"
        ],
        "stacked over bare, same total batch": lambda r: r["stacked_over_bare_same_total_batch"],
        "stacked over serial": lambda r: r["stacked_over_serial"],
        **{
            f"{case}: tokens a second, peak MB": lambda r, case=case: (
                f"{r['tokens_per_second'][case]:.0f}, {r['peak_megabytes'][case]}"
            )
            for case in next(iter(found.values()))["tokens_per_second"]
        },
    }
    return "\n".join(_columns(found, rows))


def compiled() -> str:
    """What torch.compile brings, and takes, a column a backbone."""
    found = _benchmarks("compiled")
    rows = {
        "hardware": lambda r: f"{r['hardware']}, {r['threads']} threads",
        "a step": lambda r: r["batch"],
        "compiled over stacked": lambda r: r["compiled_over_stacked"],
        "seconds of compiling": lambda r: r["processor_seconds_of_compiling"],
    }
    return "\n".join(_columns(found, rows))


def peak() -> str:
    """The share of the matrix peak, and where a step's time goes, a column a backbone."""
    found = _benchmarks("peak")
    rows = {
        "hardware": lambda r: f"{r['hardware']}, {r['threads']} threads",
        "a step": lambda r: r["batch"],
        "tokens a second": lambda r: f"{r['tokens_per_second']:.0f}",
        "measured peak, bf16, GFLOP/s": lambda r: f"{r['peak_gigaflops']:.0f}",
        "share of it, 4 N FLOPs a token": lambda r: f"{100 * r['share_of_peak']:.0f} %",
    }
    out = _columns(found, rows)
    for kind in next(iter(found.values()))["time_by_kind"]:
        shares = (f"{100 * told['time_by_kind'].get(kind, 0):.1f} %" for told in found.values())
        out.append(f"| time in {kind} | {' | '.join(shares)} |")
    return "\n".join(out)


def memory() -> str:
    """Peak memory against clients, a row a file."""
    found = _benchmarks("memory")
    counts = sorted({n for told in found.values() for n in told["peak_megabytes"]}, key=int)
    heads = " | ".join(counts)
    out = [f"| peak MB with so many clients | {heads} | most over fewest | kernels cached |"]
    out += ["|---" * (len(counts) + 3) + "|"]
    for name, told in found.items():
        peaks = " | ".join(str(told["peak_megabytes"].get(count, "-")) for count in counts)
        out.append(f"| {name} | {peaks} | {told['most_over_fewest']} | {told['kernels_cached']} |")
    return "\n".join(out)


def simulators() -> str:
    """Whole simulations, ours and others', a row a way and a workload."""
    rows = ["| workload | | seconds, whole | of which rounds | over ours | perplexity |"]
    rows += ["|---" * 6 + "|"]
    about = []
    for name, told in _benchmarks("simulators").items():
        whole = told["seconds"]
        for way, seconds in whole.items():
            over = f"{seconds / whole['fedgen run']:.2f}"
            rest = f"{told['rounds'][way]:.1f} | {over} | {told['perplexity'][way]:.2f}"
            rows.append(f"| {name} | {way} | {seconds:.1f} | {rest} |")
        loads = [run["load_before"] for runs in told["all_runs"].values() for run in runs]
        times = {len(runs) for runs in told["all_runs"].values()}
        about.append(
            f"{name}: {told['clients']} clients, cohort {told['cohort']}, {told['rounds_trained']} "
            f"rounds of {told['steps']} steps of {told['batch']} x {told['length']} tokens, "
            f"{told['precision']}; medians, runs of each: {' or '.join(map(str, sorted(times)))}; "
            f"{told['hardware']}, load before runs {min(loads)} to "
            f"{max(loads)}; the backbone's perplexity is {told['perplexity_of_backbone']:.2f}."
        )
        if "importing" in told:
            fifth = whole["fedgen run"] * told["flower_over_ours"] / 5
            about[-1] += (
                f" A fifth of Flower's time is {fifth:.1f} s: to import the libraries takes "
                f"{told['importing']:.1f} s, and our rounds {told['rounds']['fedgen run']:.1f} s."
            )
    return "\n".join([*rows, "", *about])


def overhead() -> str:
    """Seconds of a round by part, a column a file."""
    found = _benchmarks("overhead")
    out = [f"| seconds of a round | {' | '.join(found)} |", "|---" * (len(found) + 1) + "|"]
    for part in next(iter(found.values()))["seconds"]:
        own = " | ".join(f"{told['seconds'][part]:.3f}" for told in found.values())
        out.append(f"| {part} | {own} |")
    shares = " | ".join(f"{100 * told['overhead']:.1f} %" for told in found.values())
    return "\n".join([*out, f"| not training, without validation | {shares} |"])


def planned() -> str:
    """What `fedgen plan` says of a step beside what it took, a row a model and type."""
    heads = "seconds said | taken | said / taken | MB said | grown by | said / grown by"
    rows = [f"| model | arithmetic | {heads} |", "|---" * 8 + "|"]
    told = _benchmarks("planned")["2-cores"]
    for name, kinds in told["models"].items():
        for kind, r in kinds.items():
            cells = (
                f"{r['seconds_said']:.4f}",
                f"{r['seconds']:.4f}",
                f"{r['seconds_said'] / r['seconds']:.2f}",
                f"{r['bytes_said'] / 1e6:.0f}",
                f"{r['bytes'] / 1e6:.0f}",
                f"{r['bytes_said'] / r['bytes']:.2f}",
            )
            rows.append(f"| {name} | {kind} | {' | '.join(cells)} |")
    steps = (
        f"{name} {r['rows']} x {r['length']} and {r['rows_for_bytes']} x {r['length_for_bytes']}"
        for name, r in ((name, kinds["float32"]) for name, kinds in told["models"].items())
    )
    about = (
        "Tokens of the step that is timed, and of the one whose bytes are taken: "
        f"{', '.join(steps)}. {told['hardware']}, {told['threads']} threads, "
        f"torch {told['torch']}, load before "
        f"{told['load_before']:.1f}."
    )
    return "\n".join([*rows, "", about])


def network() -> str:
    """Seconds a round and a server's memory, ours beside bare Flower's, a row a case."""
    rows = [
        "| adapter | sites | seconds a round: ours | bare Flower | ours / bare | server's peak MB: "
        "ours | bare Flower |",
        "|---" * 7 + "|",
    ]
    about = ""
    for told in _benchmarks("network").values():
        runs = [run for case in told["cases"] for way in case["all_runs"].values() for run in way]
        loads = [run[when] for run in runs for when in ("load_before", "load_after")]
        about = (
            f"{told['hardware']}, Python {told['python']}, torch {told['torch']}, Flower "
            f"{told['flwr']}; load average from {min(loads)} to {max(loads)}. The backbone "
            f"`{told['backbone']}` has {told['backbone_bytes_a_site'] / 1e6:.1f} MB, which each "
            "site fetches for itself, once."
        )
        for case in told["cases"]:
            seconds, peak = case["seconds_a_round"], case["peak_megabytes"]
            rows.append(
                f"| {case['megabytes']} MB | {case['sites']} | {seconds['ours']} | "
                f"{seconds['bare']} | {case['ours_over_bare']} | {peak['ours']} | {peak['bare']} |"
            )
    return "\n".join([*rows, "", about])


def backbones() -> str:
    """Which architectures of transformers work, a row each, from a tiny random model of each."""
    judged = _benchmarks("architectures")["tiny"]
    results = {kind: _result(verdicts) for kind, verdicts in judged["rows"].items()}
    count = sum(text.startswith("works") for text in results.values())
    versions = ", ".join(f"{name} {number}" for name, number in judged["versions"].items())
    rows = [f"| `{kind}` | {text} |" for kind, text in results.items()]
    head = f"{count} of {len(results)} work ({versions})."
    return "\n".join([head, "", "| `model_type` | result |", "|---|---|", *rows])


def _result(verdicts: dict[str, str]) -> str:
    """What a row says: of the default targets, and of `all-linear` where that differs."""
    default, every = verdicts["default"], verdicts["all-linear"]
    other = next((t for t, v in verdicts.items() if v == "works"), "default")
    if other not in {"default", "all-linear"}:
        names = ", ".join(f"`{name}`" for name in other.split(", "))
        text = f"works with {names}: PEFT reads adapters of its other layers as something else"
    else:
        text = default if default == every else f"{default}; with `all-linear` {every}"
    return text.replace("|", "\\|")


def codes() -> str:
    """Every code that the gate refuses by."""
    from fedgen_edge.network.gate import CODES

    rows = [f"| `{code}` | {said} |" for code, said in CODES.items()]
    return "\n".join(["| code | what it means |", "|---|---|", *rows])


def settings() -> str:
    """The settings of `federation.toml`: each field's default, and the sentence under it."""
    from fedgen_edge.deploy.settings import DeploymentSettings

    body = ast.parse(inspect.getsource(DeploymentSettings)).body[0]
    assert isinstance(body, ast.ClassDef)
    rows = ["| setting | default | what it is |", "|---|---|---|"]
    for field, told in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(told, ast.Expr):
            value = "" if field.value is None else f"`{ast.unparse(field.value)}`"
            said = " ".join(ast.literal_eval(told.value).split())
            rows.append(f"| `{ast.unparse(field.target)}` | {value} | {said} |")
    return "\n".join(rows)


def matrix() -> str:
    """Which method works with what."""
    from fedgen_edge.cli.compatibility import format_mark, make_legend, make_rows

    columns = make_legend()
    out = [f"| method | {' | '.join(columns)} |", f"|---|{':-:|' * len(columns)}"]
    for name, found in make_rows().items():
        out.append(f"| {name} | {' | '.join(format_mark(k, found[k]) for k in columns)} |")
    return "\n".join([*out, "", *(f"- **{name}**: {about}" for name, about in columns.items())])


TABLES = {
    "quality": "quickstart",
    "tuning": "quickstart-tuning",
    "tuned": "local-only-tuned",
    **{f"cifar10-{name}": f"cifar10-{name}" for name in ("diffusion", "gan", "gan-skew", "vae")},
}
"""Tables under `paper/results`, by their marks."""


def table(name: str) -> str:
    """One of them, as it is."""
    return (kept.RESULTS / f"{name}.md").read_text().strip()


def measured(name: str, scale: str) -> str:
    """An item of the paper: its table, and its figure below it."""
    item = read(name, scale)
    made = views.table(item, rows := kept.whole(item))
    if "repeats" in item and kept.path_of(there := read(item["repeats"], scale)).exists():
        made += "\n" + varying.repeated(item, rows, there, kept.whole(there))
    if "figure" not in item:
        return made
    return f"{made}\n\n![{item['title']}](figures/{figures.path_of(item).name})"


def across(axis: str, scale: str) -> str:
    """The best values of every measured item that varies the same, and has runs of its own."""
    items = [read(name, own) for name, own in shown() if own == scale]
    same = [item for item in items if item.get("axis") == axis and "of" not in item]
    there = [item for item in same if kept.path_of(item).exists()]
    if not there:
        raise FileNotFoundError(axis)
    return varying.bests([(item, kept.whole(item)) for item in there])


PARTS: dict[str, Callable[[], str]] = {
    **{f"{name}-{scale}": partial(measured, name, scale) for name, scale in shown()},
    "ranks": partial(across, "rank", "small"),
    **{mark: partial(table, name) for mark, name in TABLES.items()},
    "speed": speed,
    "compiled": compiled,
    "peak": peak,
    "memory": memory,
    "simulators": simulators,
    "overhead": overhead,
    "planned": planned,
    "network": network,
    "backbones": backbones,
    "codes": codes,
    "settings": settings,
    "matrix": matrix,
}


def _made(make: Callable[[], str]) -> str:
    try:
        return make()
    except FileNotFoundError:
        return "Not measured yet."


def filled(text: str, *, above: bool = False) -> str:
    """A page's text, with what the records say now between its marks.

    Args:
        text: of the page.
        above: whether it lies above `docs/`, as links are written from there.
    """
    for name, make in PARTS.items():
        before, mark, rest = text.partition(f"<!-- results:{name} -->")
        _, end, after = rest.partition("<!-- end -->")
        if mark and end:
            made = _made(make)
            if above:
                made = made.replace("](../", "](").replace("](figures/", "](docs/figures/")
            text = f"{before}{mark}\n\n{made}\n\n{end}{after}"
    return text


def draw() -> None:
    """Draw every figure that there are records for."""
    for item in (read(name, scale) for name, scale in shown()):
        with suppress(FileNotFoundError):
            if "figure" in item:
                svg = figures.drawn(item, kept.whole(item))
                files.write(figures.path_of(item), svg.encode())


def main() -> None:
    """Draw the figures, and fill every page that has a mark."""
    draw()
    for page in PAGES:
        page.write_text(filled(page.read_text(), above=page.parent == ROOT))


if __name__ == "__main__":
    try:
        main()
    except FedGenError as error:
        print(f"paper: {error}", file=sys.stderr)
        sys.exit(2)
