import json
from pathlib import Path

import pytest
import torch

from fedgen_edge.errors import CheckpointError
from fedgen_edge.runs.checkpoint import ClientStateStore, commit, find_latest
from fedgen_edge.types import ServerState


def state(number: int) -> ServerState:
    value = torch.tensor([float(number), 0.1])
    return ServerState(number, {"a.lora_A": value}, first_moment={"a.lora_A": value * 2})


def run(folder: Path, rounds: int, keep: int = 2) -> ClientStateStore:
    """A run whose client r % 2 keeps the round's number."""
    memory = ClientStateStore(folder / "memory")
    for r in range(1, rounds + 1):
        memory[r % 2] = {"kept:w": torch.tensor(float(r))}
        commit(folder, state(r), memory, keep)
    return memory


def test_what_was_committed_comes_back_bit_by_bit(tmp_path: Path) -> None:
    run(tmp_path, 3)
    found, memory, refused = find_latest(tmp_path)
    assert found is not None
    assert found.round == 3
    assert torch.equal(found.adapter["a.lora_A"], state(3).adapter["a.lora_A"])
    assert torch.equal(found.first_moment["a.lora_A"], state(3).first_moment["a.lora_A"])
    assert [float(memory[c]["kept:w"]) for c in (0, 1)] == [2.0, 3.0]
    assert refused == []


def test_nothing_committed_is_the_start(tmp_path: Path) -> None:
    assert find_latest(tmp_path)[0] is None


@pytest.mark.parametrize("file", ["server.safetensors", "manifest.json"])
@pytest.mark.parametrize("harm", ["truncated", "altered", "missing"])
def test_a_damaged_commit_is_refused_by_name_and_the_one_before_is_used(
    tmp_path: Path, file: str, harm: str
) -> None:
    run(tmp_path, 3)
    path = tmp_path / "checkpoints" / "00003" / file
    content = path.read_bytes()
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-7] if harm == "truncated" else content.replace(b"3", b"4"))
        assert path.read_bytes() != content or file == "server.safetensors"
    if harm == "altered" and file == "server.safetensors":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    found, memory, refused = find_latest(tmp_path)
    assert found is not None
    assert found.round == 2
    assert str(path) in refused[0]
    # and client memory is that of round 2: client 1's third version is not seen
    assert [float(memory[c]["kept:w"]) for c in (0, 1)] == [2.0, 1.0]


def test_an_altered_memory_file_refuses_its_commit(tmp_path: Path) -> None:
    run(tmp_path, 3)
    path = tmp_path / "memory" / "000001-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    found, _, refused = find_latest(tmp_path)
    assert found is not None
    assert found.round == 2
    assert str(path) in refused[0]


def test_no_whole_commit_is_an_error_that_names_them_all(tmp_path: Path) -> None:
    run(tmp_path, 2)
    for folder in (tmp_path / "checkpoints").iterdir():
        (folder / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"00002.*00001"):
        find_latest(tmp_path)


def test_a_checkpoint_of_another_version_is_one_line_that_says_which_version_reads_it(
    tmp_path: Path,
) -> None:
    run(tmp_path, 2)
    path = tmp_path / "checkpoints" / "00002" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["format"]  # as the version before wrote it
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"format 1.*reads format 2.*run\.json") as refusal:
        find_latest(tmp_path)
    assert "\n" not in str(refusal.value)


def test_old_commits_and_unnamed_memory_are_deleted(tmp_path: Path) -> None:
    run(tmp_path, 6, keep=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["00005", "00006"]
    # commit 5 names versions of rounds 4 and 5, commit 6 those of 5 and 6; files are named by the
    # round before.
    assert sorted(p.name[7:12] for p in (tmp_path / "memory").iterdir()) == [
        "00003",
        "00004",
        "00005",
    ]


def test_memory_written_after_a_commit_does_not_touch_it(tmp_path: Path) -> None:
    memory = run(tmp_path, 2)
    memory[0] = {"kept:w": torch.tensor(99.0)}  # and then the machine stops
    _, found, _ = find_latest(tmp_path)
    assert float(found[0]["kept:w"]) == 2.0


def test_a_commit_voids_those_of_later_rounds(tmp_path: Path) -> None:
    run(tmp_path, 3)
    (tmp_path / "checkpoints" / "00003" / "manifest.json").write_text("{")
    found, memory, _ = find_latest(tmp_path)
    assert found is not None
    commit(tmp_path, state(2), memory, 2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["00002"]
