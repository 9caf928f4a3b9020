"""Tables of the benchmarks' committed results, and of the architectures that work."""

import json
import re
from collections.abc import Callable
from typing import Any

from items import ROOT

BENCHMARKS = ROOT / "benchmarks" / "results"


def read_benchmarks(kind: str) -> dict[str, Any]:
    """The results of one benchmark, by its name, with the default backbone's in full."""
    paths = sorted(BENCHMARKS.glob(f"{kind}-*.json"))
    if not paths:
        raise FileNotFoundError(kind)
    names = [p.stem.removeprefix(f"{kind}-") for p in paths]
    names = [re.sub(r"SmolLM2(-135M)?", "SmolLM2-135M-Instruct", name) for name in names]
    return {name: json.loads(p.read_text()) for name, p in zip(names, paths, strict=True)}


def make_columns(results: dict[str, Any], rows: dict[str, Callable[[Any], object]]) -> list[str]:
    """A column a result, a row a number of it."""
    out = [f"| | {' | '.join(results)} |", "|---" * (len(results) + 1) + "|"]
    return out + [
        f"| {name} | {' | '.join(str(get(r)) for r in results.values())} |"
        for name, get in rows.items()
    ]


def speed() -> str:
    """The benchmark's ratios, a column a backbone."""
    results = read_benchmarks("speed")
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
            for case in next(iter(results.values()))["tokens_per_second"]
        },
    }
    return "\n".join(make_columns(results, rows))


def compile_gain() -> str:
    """What torch.compile brings, and takes, a column a backbone."""
    results = read_benchmarks("compiled")
    rows = {
        "hardware": lambda r: f"{r['hardware']}, {r['threads']} threads",
        "a step": lambda r: r["batch"],
        "compiled over stacked": lambda r: r["compiled_over_stacked"],
        "seconds of compiling": lambda r: r["processor_seconds_of_compiling"],
    }
    return "\n".join(make_columns(results, rows))


def peak() -> str:
    """The share of the matrix peak, and where a step's time goes, a column a backbone."""
    results = read_benchmarks("peak")
    rows = {
        "hardware": lambda r: f"{r['hardware']}, {r['threads']} threads",
        "a step": lambda r: r["batch"],
        "tokens a second": lambda r: f"{r['tokens_per_second']:.0f}",
        "measured peak, bf16, GFLOP/s": lambda r: f"{r['peak_gigaflops']:.0f}",
        "share of it, 4 N FLOPs a token": lambda r: f"{100 * r['share_of_peak']:.0f} %",
    }
    out = make_columns(results, rows)
    for kind in next(iter(results.values()))["time_by_kind"]:
        shares = (
            f"{100 * result['time_by_kind'].get(kind, 0):.1f} %" for result in results.values()
        )
        out.append(f"| time in {kind} | {' | '.join(shares)} |")
    return "\n".join(out)


def memory() -> str:
    """Peak memory against clients, a row a file."""
    results = read_benchmarks("memory")
    counts = sorted({n for result in results.values() for n in result["peak_megabytes"]}, key=int)
    heads = " | ".join(counts)
    out = [f"| peak MB with so many clients | {heads} | most over fewest | kernels cached |"]
    out += ["|---" * (len(counts) + 3) + "|"]
    for name, result in results.items():
        peaks = " | ".join(str(result["peak_megabytes"].get(count, "-")) for count in counts)
        out.append(
            f"| {name} | {peaks} | {result['most_over_fewest']} | {result['kernels_cached']} |"
        )
    return "\n".join(out)


def simulators() -> str:
    """Whole simulations, ours and others', a row a way and a workload."""
    rows = ["| workload | | seconds, whole | of which rounds | over ours | perplexity |"]
    rows += ["|---" * 6 + "|"]
    about = []
    for name, result in read_benchmarks("simulators").items():
        seconds_by_way = result["seconds"]
        for way, seconds in seconds_by_way.items():
            over = f"{seconds / seconds_by_way['fedgen run']:.2f}"
            rest = f"{result['rounds'][way]:.1f} | {over} | {result['perplexity'][way]:.2f}"
            rows.append(f"| {name} | {way} | {seconds:.1f} | {rest} |")
        loads = [run["load_before"] for runs in result["all_runs"].values() for run in runs]
        times = {len(runs) for runs in result["all_runs"].values()}
        about.append(
            f"{name}: {result['clients']} clients, cohort {result['cohort']}, "
            f"{result['rounds_trained']} rounds of {result['steps']} steps of {result['batch']} x "
            f"{result['length']} tokens, {result['precision']}; medians, runs of each: "
            f"{' or '.join(map(str, sorted(times)))}; "
            f"{result['hardware']}, load before runs {min(loads)} to "
            f"{max(loads)}; the backbone's perplexity is {result['perplexity_of_backbone']:.2f}."
        )
        if "importing" in result:
            fifth = seconds_by_way["fedgen run"] * result["flower_over_ours"] / 5
            about[-1] += (
                f" A fifth of Flower's time is {fifth:.1f} s: to import the libraries takes "
                f"{result['importing']:.1f} s, and our rounds "
                f"{result['rounds']['fedgen run']:.1f} s."
            )
    return "\n".join([*rows, "", *about])


def overhead() -> str:
    """Seconds of a round by part, a column a file."""
    results = read_benchmarks("overhead")
    out = [f"| seconds of a round | {' | '.join(results)} |", "|---" * (len(results) + 1) + "|"]
    for part in next(iter(results.values()))["seconds"]:
        cells = " | ".join(f"{result['seconds'][part]:.3f}" for result in results.values())
        out.append(f"| {part} | {cells} |")
    shares = " | ".join(f"{100 * result['overhead']:.1f} %" for result in results.values())
    return "\n".join([*out, f"| not training, without validation | {shares} |"])


def plan_accuracy() -> str:
    """What `fedgen plan` says of a step beside what it took, a row a model and type."""
    heads = "seconds said | taken | said / taken | MB said | grown by | said / grown by"
    rows = [f"| model | arithmetic | {heads} |", "|---" * 8 + "|"]
    result = read_benchmarks("planned")["2-cores"]
    for name, kinds in result["models"].items():
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
        for name, r in ((name, kinds["float32"]) for name, kinds in result["models"].items())
    )
    about = (
        "Tokens of the step that is timed, and of the one whose bytes are taken: "
        f"{', '.join(steps)}. {result['hardware']}, {result['threads']} threads, "
        f"torch {result['torch']}, load before "
        f"{result['load_before']:.1f}."
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
    for result in read_benchmarks("network").values():
        runs = [run for case in result["cases"] for way in case["all_runs"].values() for run in way]
        loads = [run[when] for run in runs for when in ("load_before", "load_after")]
        about = (
            f"{result['hardware']}, Python {result['python']}, torch {result['torch']}, Flower "
            f"{result['flwr']}; load average from {min(loads)} to {max(loads)}. The backbone "
            f"`{result['backbone']}` has {result['backbone_bytes_a_site'] / 1e6:.1f} MB, which "
            "each site fetches for itself, once."
        )
        for case in result["cases"]:
            seconds, peak = case["seconds_a_round"], case["peak_megabytes"]
            rows.append(
                f"| {case['megabytes']} MB | {case['sites']} | {seconds['ours']} | "
                f"{seconds['bare']} | {case['ours_over_bare']} | {peak['ours']} | {peak['bare']} |"
            )
    return "\n".join([*rows, "", about])


def peers() -> str:
    """Measured facts beside others' programs, a row each; an empty cell was not measured."""
    simulated, speeds = read_benchmarks("simulators"), read_benchmarks("speed")
    rows = [
        "| measured | fedgen-edge | Flower 1.41.0 | NVFlare | plain PEFT loop |",
        "|---" * 5 + "|",
    ]
    for name, record in simulated.items():
        whole = record["seconds"]
        flower = min(v for way, v in whole.items() if "actor" in way)
        rows.append(
            f"| seconds of a [simulation](benchmarks/simulators.py): {name}, {record['clients']} "
            f"clients, {record['rounds_trained']} rounds | {whole['fedgen run']:.1f} | "
            f"{flower:.1f} | | |"
        )
    for name, record in speeds.items():
        tokens, peaks = record["tokens_per_second"], record["peak_megabytes"]
        bare = max((way for way in tokens if way.startswith("bare")), key=tokens.__getitem__)
        rows.append(
            f"| [tokens per second](benchmarks/speed.py), peak memory: {name}, {record['batch']} | "
            f"{tokens['stacked']:,.0f}; {peaks['stacked']:,} MB | | | "
            f"{tokens[bare]:,.0f}; {peaks[bare]:,} MB |"
        )
    (case,) = (c for c in read_benchmarks("network")["2-cores"]["cases"] if _is_shown(c))
    seconds, memory = case["seconds_a_round"], case["peak_megabytes"]
    rows.append(
        f"| seconds per round [over TLS](benchmarks/network.py), server's peak memory: "
        f"{case['megabytes']} MB adapter, {case['sites']} sites | {seconds['ours']}; "
        f"{memory['ours']:,} MB | {seconds['bare']}; {memory['bare']:,} MB | | |"
    )
    return "\n".join(rows)


def _is_shown(case: dict[str, Any]) -> bool:
    return (case["megabytes"], case["sites"]) == (20, 4)


def backbones() -> str:
    """Which architectures of transformers work, a row each, from a tiny random model of each."""
    judged = read_benchmarks("architectures")["tiny"]
    results = {kind: describe_verdicts(verdicts) for kind, verdicts in judged["rows"].items()}
    count = sum(text.startswith("works") for text in results.values())
    versions = ", ".join(f"{name} {number}" for name, number in judged["versions"].items())
    rows = [f"| `{kind}` | {text} |" for kind, text in results.items()]
    head = f"{count} of {len(results)} work ({versions})."
    return "\n".join([head, "", "| `model_type` | result |", "|---|---|", *rows])


def describe_verdicts(verdicts: dict[str, str]) -> str:
    """What a row says: of the default targets, and of `all-linear` where that differs."""
    default, every = verdicts["default"], verdicts["all-linear"]
    other = next((t for t, v in verdicts.items() if v == "works"), "default")
    if other not in {"default", "all-linear"}:
        names = ", ".join(f"`{name}`" for name in other.split(", "))
        text = f"works with {names}: PEFT reads adapters of its other layers as something else"
    else:
        text = default if default == every else f"{default}; with `all-linear` {every}"
    return text.replace("|", "\\|")
