"""What is shown while a GGUF file is converted."""

from pathlib import Path

import pytest
from tqdm.auto import tqdm

from fedgen_edge.tasks.backbones.pretrained import announce_conversion


def test_one_line_of_ours_stands_for_the_bars_of_a_conversion(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "own.gguf"
    file.write_bytes(bytes(25_000_000))

    def convert(folder: Path) -> None:
        for name in tqdm(["one", "two"], desc="Converting"):
            (folder / name).touch()

    announce_conversion(file, convert, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"own.gguf", "one", "two"}
    # 25 MB at 5 MB a second
    line = "converting own.gguf to safetensors, once on this machine: about 5 s\n"
    assert capsys.readouterr() == ("", line)


def test_what_goes_wrong_in_a_conversion_is_told_as_before(tmp_path: Path) -> None:
    file = tmp_path / "own.gguf"
    file.touch()

    def convert(folder: Path) -> None:
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        announce_conversion(file, convert, tmp_path)
