"""Our side of `simulators.py` that does what the others do: the rounds, and the last adapter.

    python benchmarks/library_rounds.py FOLDER

FOLDER has the recipe. No record, checkpoint, test or report is made.
"""

import json
import sys
import time
from pathlib import Path

from fedgen_edge.config import load
from fedgen_edge.federation.rounds import rounds
from fedgen_edge.hardware import steady_allocations
from fedgen_edge.runs.build import build


def main(place: Path) -> None:
    steady_allocations()
    parts = build(load(place / "recipe.toml"))
    state, plan = parts.start(), parts.settings.federation
    began = time.perf_counter()
    for commit in rounds(state, parts.algorithm, parts.engine, parts.train, plan):
        state = commit.state
    seconds = time.perf_counter() - began
    parts.task.model.save(place / "adapter", state.adapter, parts.settings, {})
    (place / "done.json").write_text(json.dumps({"rounds": seconds}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
