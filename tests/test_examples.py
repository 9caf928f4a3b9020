"""The programs in examples/ run as they stand, and the one from scratch is the library's rounds."""

import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedgen_edge.federation.rounds import rounds
from fedgen_edge.runs.build import build

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_fedavg_from_scratch_is_what_rounds_makes() -> None:
    example = runpy.run_path(str(EXAMPLES / "fedavg_from_scratch.py"))
    experiment = build(example["settings"]())
    start = experiment.start()
    loop = rounds(
        start,
        experiment.algorithm,
        experiment.engine,
        experiment.train,
        experiment.settings.federation,
    )
    *_, last = loop
    found = example["main"]()
    assert found.keys() == last.state.adapter.keys()
    for name, leaf in last.state.adapter.items():
        torch.testing.assert_close(found[name], leaf, atol=1e-5, rtol=0)  # AdamW, float32
        assert not torch.equal(leaf, start.adapter[name])


def test_the_library_example_saves_an_adapter_for_every_client(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runpy.run_path(str(EXAMPLES / "library.py"))["main"]("tiny", str(tmp_path / "adapters"))
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in said[:3]] == ["round 1", "round 2", "round 3"]
    assert said[3].startswith("json, global: ")
    assert said[8].startswith("urllib, personal: ")
    for client in ("json", "logging", "urllib"):
        adapter = load_file(tmp_path / "adapters" / client / "adapter_model.safetensors")
        assert all(bool(leaf.isfinite().all()) for leaf in adapter.values())
        assert (tmp_path / "adapters" / client / "adapter_config.json").is_file()
