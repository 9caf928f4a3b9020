"""Hash the adapters that every method writes, to see that a change of the code changes no number.

    python tools/adapter_hashes.py --out before.json
    python tools/adapter_hashes.py --out after.json --against before.json

Each method runs for two rounds on the tiny backbone, in float32 with one thread; `--recipe` adds a
longer one with its own settings. Bytes are equal on one machine, not from one to another.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from fedgen_edge import METHODS

RECIPES = Path(__file__).parents[1] / "recipes"
SETTINGS = {
    "fedrep": ["--training.epochs", "2", "--training.steps", "None"],
    "fednova": ["--training.optimizer", "sgd"],
    "scaffold": ["--training.optimizer", "sgd", "--training.clip", "0.0"],
    "hetlora": ["--adapter.ranks", "2", "4"],
    "rbla": ["--adapter.ranks", "2", "4"],
    "raflora": ["--adapter.ranks", "2", "4"],
    "fed-sb": ["--federation.rounds", "3"],
}
"""What a method asks for beside `tiny.toml`."""


def run(recipe: Path, arguments: list[str]) -> dict[str, str]:
    """Carry a recipe out, and hash the adapter folders of its run by path; or say why it failed."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "fedgen_edge", "run", str(recipe), "--out", str(out)]
        done = subprocess.run(
            [*command, "--engine.threads", "1", *arguments],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"},
        )
        if done.returncode:
            return {"failed": done.stderr.strip().splitlines()[-1]}
        return {
            path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(out.rglob("*.safetensors"))
            if "checkpoints" not in path.parts
        }


def main() -> int:
    """Run every method; 1 where a hash differs from the file that `--against` names."""
    parser = argparse.ArgumentParser(description="Hash the adapters that every method writes.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--recipe", nargs="*", default=[], help="RECIPE and its arguments")
    asked = parser.parse_args()
    hashes = {}
    for method in METHODS:
        arguments = ["--method.name", method, "--federation.rounds", "2"]
        hashes[method] = run(RECIPES / "tiny.toml", [*arguments, *SETTINGS.get(method, [])])
        print(method, hashes[method].get("failed") or len(hashes[method]), flush=True)
    if asked.recipe:
        hashes[asked.recipe[0]] = run(Path(asked.recipe[0]), asked.recipe[1:])
    asked.out.write_text(json.dumps(hashes, indent=1))
    before = json.loads(asked.against.read_text()) if asked.against else hashes
    unlike = [name for name in before if before[name] != hashes.get(name)]
    print("differ: " + (", ".join(unlike) or "none"))
    return int(bool(unlike))


if __name__ == "__main__":
    sys.exit(main())
