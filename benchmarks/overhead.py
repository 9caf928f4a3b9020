"""What a round costs beyond training: by part, as a share of the whole.

    python benchmarks/overhead.py --out benchmarks/results/overhead-NAME.json

The rounds of `fedgen run`, in its own loop, with its records and commits on the disk, on a random
Llama whose adapter has about a million values: 64 clients, all in each round, 50 steps of one block
of 64 tokens. A larger backbone, or more tokens in a step, would train for longer and cost no more
besides, so these are the worst of what is usual. Diagnostics are computed in every round.

Training is `client.local_update` with its batches. Validation is measured, and is no part of the
whole: it is asked for, and as long as one says. Shares are of a round without it, and medians are
over the rounds after the first, which compiles kernels.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from fedgen_edge.algorithms.algorithm import Algorithm
from fedgen_edge.config import Settings, from_table
from fedgen_edge.federation import jobs, orders
from fedgen_edge.hardware import describe_hardware, steady_allocations
from fedgen_edge.runs import federate, records
from fedgen_edge.runs.build import Experiment
from fedgen_edge.runs.run import create
from fedgen_edge.seeds import seed_global_generators
from fedgen_edge.tasks.backbones import pretrained

CLIENTS, STEPS, LENGTH = 64, 50, 64
TRAINING, VALIDATION = "training", "validation"
PARTS: dict[str, list[tuple[Any, str]]] = {
    TRAINING: [(jobs, "local_update")],
    "select": [(Experiment, "cohort")],
    "encode, read, down": [(orders, "encode_broadcast"), (orders, "decode_broadcast")],
    "start and stack": [(jobs.Clients, "prepare_inputs")],
    "encode, up": [(jobs, "encode_update")],
    "read, up": [(jobs, "decode_update")],
    "memory": [(Algorithm, "keeps"), (Algorithm, "learns"), (jobs.Train, "commit_updates")],
    "looked at": [(federate, "_check_finite")],
    "merge and step": [(Algorithm, "step")],
    "record": [(federate, "_make_round_record"), (records, "append")],
    "diagnostics": [(federate, "measure_layers")],
    "checkpoint": [(federate, "commit")],
    VALIDATION: [(Experiment, "validation")],
}
"""Functions that one part of a round is; none calls another."""


def lay(place: Path, size: int) -> Path:
    """A random Llama with the tokenizer of the tiny backbone, and text of 64 clients."""
    tiny = pretrained.find_folder(from_table({"backbone": {"path": "tiny"}}).backbone)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size,
        intermediate_size=2 * size,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    with seed_global_generators("overhead"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(place / "backbone")
    tokenizer.save_pretrained(place / "backbone")
    with (place / "data.jsonl").open("w") as file:
        for client in range(CLIENTS):
            for at in range(16):
                text = f"Line {at} of client {client}: the dog saw a ball, and ran home with it."
                file.write(json.dumps({"text": text, "who": f"c{client:03d}"}) + "\n")
    return place / "backbone"


def settings_of(place: Path, rank: int, count: int, steps: int) -> Settings:
    data = {"source": "jsonl", "path": str(place / "data.jsonl"), "client_field": "who"}
    return from_table(
        {
            "backbone": {"path": str(place / "backbone"), "precision": "float32"},
            "adapter": {"rank": rank, "target_modules": "all-linear"},
            "data": {**data, "length": LENGTH},
            "federation": {"rounds": count},
            "training": {"steps": steps, "batch": 1},
            "evaluation": {"blocks": 1, "sample_tokens": 0},
        }
    )


def timed(found: Counter[str], part: str, what: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, its seconds added to its part."""

    def run(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return what(*args, **kwargs)
        finally:
            found[part] += time.perf_counter() - began  # pyright: ignore[reportArgumentType]

    return run


@contextmanager
def watched() -> Iterator[Counter[str]]:
    """Seconds of each part, as they add up within."""
    found: Counter[str] = Counter()
    with ExitStack() as stack:
        for part, functions in PARTS.items():
            for owner, name in functions:
                timer = timed(found, part, getattr(owner, name))
                stack.enter_context(patch.object(owner, name, timer))
        yield found


def measured(place: Path, rank: int, size: int, count: int, steps: int) -> dict[str, Any]:
    """Every round's seconds, by part; and what was run."""
    lay(place, size)
    experiment = create(settings_of(place, rank, count, steps), place / "run")
    spent: list[dict[str, float]] = []
    with watched() as found:
        began = time.perf_counter()
        for _ in federate.federate(experiment, place / "run"):
            whole = time.perf_counter() - began
            parts = {part: found[part] for part in PARTS}
            spent.append({**parts, "other": whole - sum(parts.values())})
            found.clear()
            began = time.perf_counter()
    shapes = experiment.task.model.leaf_shapes().values()
    return {
        "values": sum(torch.Size(shape).numel() for shape in shapes),
        "leaves": len(shapes),
        "stack": experiment.settings.engine.stack,
        "rounds": spent,
    }


def summary(spent: list[dict[str, float]]) -> dict[str, Any]:
    """Medians over rounds: seconds of each part, and the share of what is not training."""
    later = spent[1:] or spent
    seconds = {part: statistics.median(own[part] for own in later) for part in later[0]}
    shares = []
    for own in later:
        whole = sum(own.values()) - own[VALIDATION]
        shares.append(1 - own[TRAINING] / whole)
    return {
        "seconds": {part: round(value, 4) for part, value in seconds.items()},
        "overhead": round(statistics.median(shares), 4),
        "of_each_round": [round(share, 4) for share in shares],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rank", type=int, default=58)
    parser.add_argument("--size", type=int, default=256, help="of the backbone's hidden states")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=Path)
    told = parser.parse_args()
    steady_allocations()
    with tempfile.TemporaryDirectory() as place:
        found = measured(Path(place), told.rank, told.size, told.rounds, told.steps)
    spent = found.pop("rounds")
    result = {
        "hardware": describe_hardware(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "torch": version("torch"),
        "clients": CLIENTS,
        "steps": told.steps,
        "tokens_a_step": LENGTH,
        "seed": 0,
        **found,
        "load_after": round(os.getloadavg()[0], 1),
        **summary(spent),
    }
    print(json.dumps(result, indent=1))
    if told.out:
        told.out.write_text(json.dumps(result, indent=1) + os.linesep)


if __name__ == "__main__":
    main()
