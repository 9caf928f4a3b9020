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


def speed() -> str:
    """The benchmark's ratios, a column a backbone."""
    found: dict[str, Any] = {
        path.stem.removeprefix("speed-"): json.loads(path.read_text())
        for path in sorted(BENCHMARKS.glob("speed-*.json"))
    }
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
    """Peak memory against clients."""
    told = json.loads((BENCHMARKS / "memory.json").read_text())
    peaks = told["peak_megabytes"]
    return (
        f"| clients | {' | '.join(peaks)} |\n{'|---' * (len(peaks) + 1)}|\n"
        f"| peak MB ({told['backbone']}) | {' | '.join(map(str, peaks.values()))} |"
    )


PARTS = {
    "quality": lambda: (PAPER / "quickstart.md").read_text().strip(),
    "tuned": lambda: (PAPER / "local-only-tuned.md").read_text().strip(),
    "speed": speed,
    "memory": memory,
}


def _made(make: Callable[[], str]) -> str:
    try:
        return make()
    except FileNotFoundError:
        return "Not measured yet."


def main() -> None:
    """Fill every page that has a mark."""
    for page in (ROOT / "README.md", ROOT / "docs" / "results.md"):
        text = page.read_text()
        for name, make in PARTS.items():
            before, mark, rest = text.partition(f"<!-- results:{name} -->")
            _, end, after = rest.partition("<!-- end -->")
            if mark and end:
                text = f"{before}{mark}\n\n{_made(make)}\n\n{end}{after}"
        page.write_text(text)


if __name__ == "__main__":
    main()
