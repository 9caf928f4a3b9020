"""Which architectures of transformers work as backbones: a tiny random model of each is judged.

    python benchmarks/architectures.py --out benchmarks/results/architectures-tiny.json
    python benchmarks/architectures.py --kinds llama gpt2

Of every causal architecture, with its default targets and with `all-linear`, in float32: packed
documents cost what transformers' plain model says of each alone, a stack of clients is each client
alone, and PEFT computes with the written adapter what this package computes with it.
"""

import argparse
import json
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import peft
import torch
import transformers
from peft import PeftModel
from tiny_models import KINDS, write_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from fedgen_edge import files
from fedgen_edge.config import from_table
from fedgen_edge.data.batches import pack
from fedgen_edge.errors import FedGenError
from fedgen_edge.leaves import stack
from fedgen_edge.runs.build import Experiment, build
from fedgen_edge.seeds import generator
from fedgen_edge.types import Leaves

WORKS = "works"
PEFT = "PEFT's logits"
MISREAD = "refused: PEFT reads its adapters as something else"
TEXTS = ["the cat saw red dogs", "a boat", "One day the moon went up", "fish"]
TARGETS: dict[str, list[str]] = {"default": [], "all-linear": ["all-linear"]}
CLOSE = 1e-5
"""Of a sum of nats, or of logits' size, in float32."""


def judge(kind: str) -> dict[str, str]:
    """For each choice of targets `works`, or why not; and for the targets that a refusal names."""
    with TemporaryDirectory(prefix="fedgen-") as root:
        folder = Path(root)
        try:
            write_model(kind, folder / "model")
        except Exception as error:  # whatever a library raises that is asked for 196 models
            return dict.fromkeys(TARGETS, f"not tried: {_shorten(error, folder)}")
        verdicts = {name: _judge_targets(folder, t) for name, t in TARGETS.items()}
        if verdicts["default"] == MISREAD and (names := read_by_peft(folder)):
            verdicts[", ".join(names)] = _judge_targets(folder, names)
        return verdicts


def read_by_peft(root: Path) -> list[str]:
    """The names of the layers of which PEFT reads adapters as they are."""
    lora: Any = build_experiment(root, []).task.model.adapter
    names = sorted({name.rsplit(".", 1)[-1] for name in lora.sites})
    return [name for name in names if _judge_targets(root, [name]) == WORKS]


def _judge_targets(root: Path, targets: Sequence[str]) -> str:
    try:
        experiment = build_experiment(root, targets)
    except FedGenError as error:
        return f"refused: {_shorten(error, root)}"
    except Exception as error:
        return f"error: {type(error).__name__}: {_shorten(error, root)}"
    checks: dict[str, Callable[[Path, Experiment], float]] = {
        "packed documents": compare_packed,
        "a stack of clients": compare_stacked,
        PEFT: compare_peft,
    }
    for name, check in checks.items():
        try:
            off = check(root, experiment)
        except Exception as error:
            return f"error: {name}: {type(error).__name__}: {_shorten(error, root)}"
        if not off <= CLOSE:
            return MISREAD if name == PEFT else f"wrong: {name} are off by {off:.0e}"
    return WORKS


def build_experiment(root: Path, targets: Sequence[str]) -> Experiment:
    """A run of two clients on the model in `root/model`.

    Raises:
        FedGenError: its backbone or its targets are refused.
    """
    rows = [{"text": f"dog {i} saw {i * i} cats", "client": f"c{i % 2}"} for i in range(20)]
    data = root / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    table = {
        "backbone": {"path": str(root / "model"), "precision": "float32"},
        "adapter": {"rank": 4, "target_modules": list(targets)},
        "data": {"source": "jsonl", "path": str(data), "client_field": "client", "length": 64},
        "engine": {"device": "cpu"},
    }
    return build(from_table(table))


def compare_packed(root: Path, experiment: Experiment) -> float:
    """Packed documents' nats against a plain loop of transformers over each document."""
    task: Any = experiment.task
    documents = task.encode(TEXTS)
    batch = pack(documents, [len(t.split()) for t in TEXTS], 256)
    ours = float(task.evaluate({}, batch)["total"])
    model = load_plain(root)
    theirs = sum(measure_nats(model, ids) for ids in documents)
    return abs(ours - theirs) / theirs


def load_plain(root: Path) -> Any:
    """Transformers' own model."""
    return AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float32).eval()


@torch.no_grad()
def measure_nats(model: Any, ids: Sequence[int]) -> float:
    """Of one document, by transformers alone."""
    tokens = torch.tensor([ids])
    logits = model(tokens[:, :-1]).logits[0].float()
    return float(F.cross_entropy(logits, tokens[0, 1:], reduction="sum"))


def draw_noise(experiment: Experiment, seed: int) -> Leaves:
    """An adapter no part of which is zero."""
    rng = generator("noise", seed)
    shapes = experiment.task.model.leaf_shapes()
    return {k: torch.randn(shape, generator=rng) * 0.1 for k, shape in shapes.items()}


def compare_stacked(_root: Path, experiment: Experiment) -> float:
    """Nats of two clients in one pass against each client's own."""
    task: Any = experiment.task
    adapters = [draw_noise(experiment, c) for c in (0, 1)]
    batches = [pack(task.encode(TEXTS[c : c + 2]), [1, 1], 128) for c in (0, 1)]
    batch = {k: torch.stack([b[k] for b in batches]) for k in batches[0]}
    together = task.evaluate(stack(adapters), batch)["total"]
    alone = [float(task.evaluate(*pair)["total"]) for pair in zip(adapters, batches, strict=True)]
    return max(abs(float(a) - b) / b for a, b in zip(together, alone, strict=True))


def compare_peft(root: Path, experiment: Experiment) -> float:
    """Our logits under an adapter against PEFT's, loaded from the folder that is written of it."""
    task: Any = experiment.task
    adapter, folder = draw_noise(experiment, 0), root / "adapter"
    task.model.save(folder, adapter, experiment.settings, {})
    tokens = torch.tensor([task.encode(TEXTS[:1])[0]])
    with torch.no_grad(), task.model.adapter.bind(adapter):
        ours = task.module.model(tokens, use_cache=False).logits
    theirs = PeftModel.from_pretrained(load_plain(root), str(folder)).eval()
    with torch.no_grad():
        difference = theirs(tokens, use_cache=False).logits - ours
    return float(difference.norm() / ours.norm())


def _shorten(error: Exception, root: Path) -> str:
    """What an error says, without what names the folder, and without what to do instead."""
    line = " ".join(str(error).split()).replace(str(root / "model"), "it")
    return re.sub(r"^backbone\.path='it'(, an? \S+,)? |: take another$", "", line)[:300]


def record(kinds: Sequence[str]) -> dict[str, Any]:
    """Versions, and a row an architecture."""
    rows: dict[str, Mapping[str, str]] = {}
    for kind in kinds:
        rows[kind] = judge(kind)
        print(kind, rows[kind], flush=True)
    versions = {m.__name__: str(m.__version__) for m in (transformers, peft, torch)}
    return {"versions": versions, "rows": rows}


def main() -> None:
    """Judge, and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="*", default=KINDS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")  # transformers' own, of some models
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    found = record(arguments.kinds)
    if arguments.out:
        files.write(arguments.out, json.dumps(found, indent=1).encode())


if __name__ == "__main__":
    main()
