"""The page of backbones says what is true of the installed transformers."""

import json
from pathlib import Path

import architectures
import pytest
import tiny_models
import transformers
from tiny_models import KINDS

from fedgen_edge.runs.progress import describe_run

RECORD = Path(__file__).parents[1] / "benchmarks" / "results" / "architectures-tiny.json"
JUDGED = json.loads(RECORD.read_text("utf-8"))
FEW = ["llama", "gpt2", "falcon", "qwen3_moe", "llama4_text", "bart", "rwkv"]

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # transformers' own, of some models
    pytest.mark.skipif(
        JUDGED["versions"]["transformers"] != transformers.__version__,
        reason="the page was made with another version of transformers",
    ),
]


def test_the_page_has_every_causal_architecture_and_a_hundred_work() -> None:
    assert list(JUDGED["rows"]) == [*KINDS]
    working = [kind for kind, verdicts in JUDGED["rows"].items() if "works" in verdicts.values()]
    assert len(working) >= 100
    verdicts = [verdict for row in JUDGED["rows"].values() for verdict in row.values()]
    assert not [verdict for verdict in verdicts if verdict.startswith(("error", "wrong"))]


@pytest.mark.parametrize("kind", FEW)
def test_a_row_of_the_page_is_true(kind: str) -> None:
    assert architectures.judge(kind) == JUDGED["rows"][kind]


def test_a_run_says_that_all_linear_leaves_experts_frozen(tmp_path: Path) -> None:
    tiny_models.write_model("qwen3_moe", tmp_path / "model")
    weights = dict(architectures.load_plain(tmp_path).named_parameters())
    experts = sum(w.numel() for name, w in weights.items() if ".experts." in name)
    share = experts / sum(w.numel() for w in weights.values())
    lines = describe_run(architectures.build_experiment(tmp_path, ["all-linear"])).splitlines()
    frozen = f"{share:.0%} of the backbone's weights"
    assert lines[1:] == [f"all-linear leaves routed experts frozen, {frozen}"]
    assert len(describe_run(architectures.build_experiment(tmp_path, ["q_proj"])).splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_row_of_the_page_is_true(kind: str) -> None:
    assert architectures.judge(kind) == JUDGED["rows"][kind]
