"""A finished run's folder, hand-made, whose names are hostile."""

import json
import math
from pathlib import Path
from typing import Any

from fedgen_edge.tasks.language.task import MEASURE

HOSTILE = "<script>alert('$x^2$')</script>"
CLIENTS = ("a & b", HOSTILE, "日本\ud800\x00")
BITS = {"backbone": 6, "local-only": 5, "global": 4, "personal": 3}

TUNED = {
    "folder": "a",
    "validation": [3.0, 2.5],
    "chosen": 1,
    "test": {"total": 200.0, "count": 100},
}


def make_run(folder: Path, seed: int = 0, lr: float = 0.001, bits: float = 0.0) -> Path:
    """A finished run of three rounds; each model's perplexity is 2 to the power of its BITS."""
    (folder / "baselines" / "local-only").mkdir(parents=True)
    settings = (
        f'[federation]\nseed = {seed}\n[method]\nname = "fedgen-edge"\n[training]\nlr = {lr}\n'
    )
    facts = {
        "measure": MEASURE,
        "finished": True,
        "full_bytes": 10**6,
        "adapter_bytes": 2000,
        "hardware": HOSTILE,
    }
    tests = {m: 100 * (n + (bits if m == "global" else 0)) * math.log(2) for m, n in BITS.items()}
    contents = {
        "clients.json": [
            {"client": c, "train": 9, "items": 4000, "labels": {"x": 5, HOSTILE: 4}}
            for c in CLIENTS
        ],
        "rounds.jsonl": [a_round(r, 2000) for r in (1, 2, 3)],
        "baselines/local-only/rounds.jsonl": [a_round(r, 0) for r in (1, 2, 3)],
        "personal.jsonl": [{"client": c, **TUNED} for c in CLIENTS],
        "evaluation.jsonl": [
            {"model": m, "client": c, "total": n, "count": 100, "words": 50}
            for m, n in tests.items()
            for c in CLIENTS
        ],
        "samples.jsonl": [
            {"model": m, "client": CLIENTS[0], "prompt": "The ", "text": f"The {m} </p>{HOSTILE}"}
            for m in ("backbone", "global", "personal")
        ],
    }
    (folder / "settings.toml").write_text(settings)
    (folder / "run.json").write_text(json.dumps(facts))
    for name, rows in contents.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / name).write_text(json.dumps(rows) if name == "clients.json" else text)
    return folder


def several(here: Path) -> list[Path]:
    """Two rates, three seeds each: the second's global adapter is worse by a bit a token."""
    runs = [make_run(here / f"slow{s}", s, bits=s / 10) for s in range(3)]
    return runs + [make_run(here / f"fast{s}", s, lr=0.1, bits=s / 10 + 1) for s in range(3)]


def a_round(number: int, each: int) -> dict[str, Any]:
    """Every client sends `each` bytes; losses are 5 - number nats."""
    nats = 5.0 - number
    told = {"loss": nats, "steps": 5, "weight": 9, "bytes_up": each, "drift": 1.0}
    return {
        "round": number,
        "cohort": list(CLIENTS),
        "loss": nats,
        "validation": {"total": 3000 * nats, "count": 3000, "words": 2000, "clients": {}},
        "bytes_up": 3 * each,
        "bytes_down": 3 * each,
        "clients": [{"client": c, **told} for c in CLIENTS],
        "update_norm": 0.9,
        "mean_norm": 0.9,
        "layers": {
            name: {"error": error / number, "rank": 3.0, "a": 2.0, "b": number}
            for name, error in (("plain", 0.1), (HOSTILE, 0.2))
        },
    }
