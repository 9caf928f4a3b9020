"""What comes with the package and is found from any folder."""

from pathlib import Path

import pytest

from fedgen_edge.cli import main as cli
from fedgen_edge.cli.arguments import pop_recipe
from fedgen_edge.config import load

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", ["quickstart", "quickstart.toml", "recipes/quickstart.toml"])
def test_a_recipe_that_is_shipped_is_found_by_its_name_in_any_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert pop_recipe([name]) == (name, load(ROOT / "recipes" / "quickstart.toml"))


@pytest.mark.parametrize("name", ["quickstart.toml", "recipes/quickstart.toml"])
def test_a_file_that_is_there_is_taken_before_one_that_is_shipped(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipes").mkdir()
    Path(name).write_text('task = "vae"\n')
    assert pop_recipe([name])[1].task == "vae"


@pytest.mark.parametrize("name", ["quickstrat", "mine/quickstart.toml", "recipes/none.toml"])
def test_a_recipe_that_is_nowhere_is_one_line_that_names_those_shipped(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        cli.main(["run", name])
    assert caught.value.code == 2
    assert capsys.readouterr().err == (
        f"fedgen: no settings file at {name}: give a TOML file, or a recipe that is shipped: "
        f"{', '.join(sorted(path.stem for path in (ROOT / 'recipes').glob('*.toml')))}\n"
    )
