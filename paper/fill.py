"""Write measured results into the pages that quote them, between `<!-- results:NAME -->` marks.

    python paper/fill.py

Every number comes from a file under `paper/results` or `benchmarks/results`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks" / "results"
PAPER = ROOT / "paper" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md")


def _benchmarks(kind: str) -> dict[str, Any]:
    """The results of one benchmark, by what comes after its name."""
    paths = sorted(BENCHMARKS.glob(f"{kind}-*.json"))
    if not paths:
        raise FileNotFoundError(kind)
    return {p.stem.removeprefix(f"{kind}-"): json.loads(p.read_text()) for p in paths}


def speed() -> str:
    """The benchmark's ratios, a column a backbone."""
    found = _benchmarks("speed")
    rows = {
        "hardware": lambda r: f"{r['hardware']}, {r['threads']} threads",
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
    out = [f"| | {' | '.join(found)} |", "|---" * (len(found) + 1) + "|"]
    out += [
        f"| {n} | {' | '.join(str(get(r)) for r in found.values())} |" for n, get in rows.items()
    ]
    return "\n".join(out)


def memory() -> str:
    """Peak memory against clients, a row a file."""
    found = _benchmarks("memory")
    counts = list(next(iter(found.values()))["peak_megabytes"])
    out = [f"| peak MB with so many clients | {' | '.join(counts)} | kernels cached |"]
    out += ["|---" * (len(counts) + 2) + "|"]
    for name, told in found.items():
        peaks = " | ".join(str(told["peak_megabytes"][count]) for count in counts)
        out.append(f"| {name} | {peaks} | {told['kernels_cached']} |")
    return "\n".join(out)


PARTS = {
    "quality": lambda: (PAPER / "quickstart.md").read_text().strip(),
    "tuning": lambda: (PAPER / "quickstart-tuning.md").read_text().strip(),
    "tuned": lambda: (PAPER / "local-only-tuned.md").read_text().strip(),
    "cifar10-diffusion": lambda: (PAPER / "cifar10-diffusion.md").read_text().strip(),
    "cifar10-vae": lambda: (PAPER / "cifar10-vae.md").read_text().strip(),
    "speed": speed,
    "memory": memory,
}


def _made(make: Callable[[], str]) -> str:
    try:
        return make()
    except FileNotFoundError:
        return "Not measured yet."


def filled(text: str) -> str:
    """A page's text, with what the records say now between its marks."""
    for name, make in PARTS.items():
        before, mark, rest = text.partition(f"<!-- results:{name} -->")
        _, end, after = rest.partition("<!-- end -->")
        if mark and end:
            text = f"{before}{mark}\n\n{_made(make)}\n\n{end}{after}"
    return text


def main() -> None:
    """Fill every page that has a mark."""
    for page in PAGES:
        page.write_text(filled(page.read_text()))


if __name__ == "__main__":
    main()
