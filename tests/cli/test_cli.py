"""The command: it runs a federation, explains itself, and answers a mistake with one line."""

import ast
import contextlib
import inspect
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM

from fedgen_edge import config
from fedgen_edge.algorithms.methods import METHODS
from fedgen_edge.cli import deploy, models, plan
from fedgen_edge.cli import main as cli
from fedgen_edge.errors import is_out_of_memory

FRAME = re.compile(r"[╭╮╰╯│─\s]+")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(count: int = 30, client: str = "anna") -> str:
    record = '{"text": "Sentence number %d of %s.", "who": "%s"}\n'
    return "".join(record % (i, client, client) for i in range(count))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of two clients' texts."""
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text(rows(client="anna") + rows(client="berta"))
    return path


def run(data: Path, *more: str) -> list[str]:
    """Arguments of a run on the tiny backbone."""
    told = {
        "backbone.path": "tiny",
        "data.source": "jsonl",
        "data.path": str(data),
        "data.client-field": "who",
    }
    return ["run", *(part for key, value in told.items() for part in (f"--{key}", value)), *more]


@pytest.fixture(scope="module")
def done(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run of two rounds, and what was printed."""
    out = tmp_path_factory.mktemp("runs") / "done"
    short = (
        "--federation.rounds 2 --training.steps 1 --personal.epochs 1 --evaluation.sample-tokens 1 "
        "--backbone.precision bf16"
    )
    with contextlib.redirect_stdout(io.StringIO()) as said:
        cli.main(run(texts, "--out", str(out), *short.split()))
    return out, said.getvalue()


def says(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command that succeeds prints."""
    cli.main(arguments)
    said, complained = capsys.readouterr()
    assert complained == ""
    return said


def refuses(
    arguments: Sequence[str], words: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """One line with these words, exit 2, no traceback, nothing written."""
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    said, complained = capsys.readouterr()
    assert (caught.value.code, said) == (2, "")
    assert re.fullmatch(r"fedgen: [^\n]+\n", complained)
    for word in words:
        assert word in complained
    assert list(Path.cwd().rglob("*")) == []


# ---- what it does


def test_a_run_prints_its_progress_its_table_and_where_things_are(done: tuple[Path, str]) -> None:
    out, said = done
    assert "federation 1/2 loss" in said
    for word in ("worst client", "MB up", "report.html", "clients/anna", "clients/berta"):
        assert word in said
    assert len((out / "rounds.jsonl").read_text().splitlines()) == 2
    assert (out / "report.html").stat().st_size > 1000
    for adapter in ("global", "clients/anna", "clients/berta"):
        assert PeftConfig.from_pretrained(str(out / "adapters" / adapter)).peft_type == "LORA"
        assert (out / "adapters" / adapter / "provenance.json").is_file()


def test_a_runs_settings_are_its_own_recipe(done: tuple[Path, str], texts: Path) -> None:
    settings = config.load(done[0] / "settings.toml")
    assert settings.federation.rounds == 2
    assert settings.data.path == str(texts)


def test_a_setting_on_the_command_line_goes_before_the_files(
    texts: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path_factory.mktemp("recipe") / "own.toml"
    recipe.write_text("[adapter]\nrank = 999\n[federation]\ncohort = 7\n")
    arguments = run(texts, "--adapter.rank", "2")
    refuses([arguments[0], str(recipe), *arguments[1:]], ["federation.cohort=7"], capsys)


def test_a_finished_run_is_resumed_to_the_same_result(
    done: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    out, said = done
    kept = {name: (out / name).read_bytes() for name in ("rounds.jsonl", "evaluation.jsonl")}
    again = says(["resume", str(out)], capsys)
    assert {name: (out / name).read_bytes() for name in kept} == kept
    assert again.splitlines()[-2:] == said.splitlines()[-2:]


def test_a_report_is_one_page(
    done: tuple[Path, str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = done
    assert says(["report", str(out)], capsys) == f"{out / 'report.html'}\n"
    assert says(["report", str(out), str(out)], capsys) == "comparison.html\n"
    assert "</html>" in (here / "comparison.html").read_text()


@pytest.mark.parametrize("which", [[], ["--client", "anna"], ["--backbone"]])
def test_a_prompt_is_continued_and_always_the_same(
    which: list[str], done: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", str(done[0]), "--prompt", "One day", "--tokens", "5", *which]
    text = says(arguments, capsys)
    assert text.startswith("One day")
    assert says(arguments, capsys) == text


def test_adapters_are_exported_as_they_are_in_the_run(
    done: tuple[Path, str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = done
    said = says(["export", str(out), "--out", "copy"], capsys)
    made = ["global", "clients/anna", "clients/berta"]
    assert said.splitlines() == [f"copy/{name}" for name in made]
    for name in made:
        copy, own = here / "copy" / name, out / "adapters" / name
        weights = "adapter_model.safetensors"
        assert (copy / weights).read_bytes() == (own / weights).read_bytes()


def test_a_run_is_served_where_its_data_are_not(
    done: tuple[Path, str], texts: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = done
    shutil.copytree(out, here / "run")
    settings = here / "run" / "settings.toml"
    settings.write_text(settings.read_text().replace(str(texts), "/nowhere/to/be/found"))
    asked = ["--prompt", "One day", "--tokens", "5", "--client", "anna"]
    there, here_too = (says(["generate", str(run_), *asked], capsys) for run_ in (out, "run"))
    assert there == here_too
    says(["export", "run", "--out", "copy"], capsys)


def test_a_merged_model_is_a_folder_that_transformers_loads(
    done: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["export", str(done[0]), "--out", "merged", "--client", "anna", "--merge"]
    assert says(arguments, capsys) == "merged\n"
    # The run's arithmetic was bf16; what is merged is the backbone as it came, in float32.
    merged = AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    path = json.loads((done[0] / "run.json").read_text())["backbone"]["path"]
    backbone = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(backbone, str(done[0] / "adapters" / "clients" / "anna"))
    ids = torch.arange(20).unsqueeze(0)
    torch.testing.assert_close(merged(ids).logits, tuned(ids).logits, rtol=1e-5, atol=1e-5)


def test_adapters_are_exported_into_the_run_where_no_folder_is_named(
    done: tuple[Path, str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(done[0], here / "run")
    said = says(["export", "run", "--client", "anna"], capsys)
    assert said == "run/export/clients/anna\n"


def test_the_status_of_a_simulation_says_how_far_it_is(
    done: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    first, *_, last = says(["status", str(done[0])], capsys).splitlines()
    assert first.startswith(f"simulation in {done[0]}: round 2 of 2, finished: `fedgen report")
    assert last == "2 clients have a personal adapter"


def test_every_method_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    listed = says(["methods"], capsys).splitlines()[: len(METHODS)]
    assert [line.split()[0] for line in listed] == list(METHODS)


# ---- mistakes in a setting

FLAGS = {
    "rank 0": ("--adapter.rank 0", ["adapter.rank=0", "greater than or equal to 1"]),
    "rank above a layer": ("--adapter.rank 33", ["adapter.rank=33", "above 32", "take at most 32"]),
    "rank above a smaller layer": (
        "--adapter.rank 17 --adapter.target-modules v_proj",
        ["adapter.rank=17", "take at most 16"],
    ),
    "ranks above the adapter's": (
        "--method.name rbla --adapter.ranks 2 9",
        ["adapter.ranks=[2, 9]", "at most adapter.rank=8"],
    ),
    "ranks that a method cannot merge": (
        "--adapter.ranks 2 8",
        ["adapter.ranks=[2, 8]", "method.name='fedgen-edge'", "hetlora, rbla, raflora"],
    ),
    "ranks that a baseline cannot merge": (
        "--method.name rbla --adapter.ranks 2 8 --evaluation.baselines fedper",
        ["evaluation.baselines='fedper'", "hetlora, rbla, raflora"],
    ),
    "rank a word": ("--adapter.rank eight", ["--adapter.rank", "'eight'"]),
    "unknown key": ("--adapter.rnak 4", ["'adapter.rnak'", "did you mean 'adapter.rank'?"]),
    "unknown key with =": ("--adapter.rnak=4", ["'adapter.rnak'", "did you mean 'adapter.rank'?"]),
    "unknown part": ("--trainig.lr 1", ["'trainig.lr'", "did you mean 'training.lr'?"]),
    "key without part": ("--lr 1", ["'lr'", "did you mean 'training.lr'?"]),
    "targets match nothing": (
        "--adapter.target-modules query",
        ["adapter.target_modules=['query']", "q_proj", "all-linear"],
    ),
    "one target of two matches nothing": (
        "--adapter.target-modules q_proj vproj",
        ["adapter.target_modules=['q_proj', 'vproj']: vproj match no layer", "v_proj"],
    ),
    "targets no expression": (
        "--adapter.target-modules (q_proj",
        ["adapter.target_modules='(q_proj'", "no regular expression"],
    ),
    "targets no layer": (
        "--adapter.target-modules norm",
        ["adapter.target_modules", "LlamaRMSNorm", "Linear"],
    ),
    "cohort too large": ("--federation.cohort 3", ["federation.cohort=3", "at most 2"]),
    "nobody trains": (
        "--federation.unseen_clients 2",
        ["federation.unseen_clients=2", "have fewer"],
    ),
    "too many clients": ("--federation.clients 3", ["federation.clients=3", "lower it"]),
    "rate NaN": ("--training.lr nan", ["training.lr=nan", "finite"]),
    "rate infinite": ("--training.lr inf", ["training.lr=inf", "finite"]),
    "rate below 0": ("--training.lr -1", ["training.lr=-1", "greater than 0"]),
    "no value": ("--training.lr", ["--training.lr", "Missing value"]),
    "no choice": ("--training.optimizer adam", ["--training.optimizer", "'adam'", "'adamw'"]),
    "unknown method": ("--method.name fedporx", ["method.name='fedporx'", "'fedprox'"]),
    "unknown baseline": (
        "--evaluation.baselines fedper locally",
        ["evaluation.baselines", "'locally'", "'local-only'"],
    ),
    "bad device": ("--engine.device tpu", ["engine.device='tpu'", "say cpu"]),
    "no such device": ("--engine.device cuda:99", ["engine.device='cuda:99'", "say cpu"]),
    "no backbone": (
        "--backbone.path /none/at/all",
        ["backbone.path='/none/at/all'", "give a folder"],
    ),
    "no GGUF file": ("--backbone.path none.gguf", ["backbone.path='none.gguf'", "no such GGUF"]),
    "no package": ("--backbone.path package:none", ["backbone.path='package:none'", "pip install"]),
    "layers that are all personal": (
        "--method.name fedper --method.personal-layers 99",
        ["method.personal_layers=99", "must be below 2"],
    ),
    "a baseline's layers that are all personal": (
        "--evaluation.baselines fedper --method.personal-layers 99",
        ["method.personal_layers=99", "must be below 2"],
    ),
    "pictures for a language model": (
        "--data.source digits --partition.by iid --federation.clients 2",
        ["task='language'", "the data are pictures", "set data.source"],
    ),
    "a backbone that is not made yet": (
        "--task vae --data.source digits --partition.by iid --federation.clients 2 "
        "--backbone.path ./backbones/none",
        ["backbone.path='./backbones/none'", "fedgen pretrain"],
    ),
    "samples of text": (
        "--image_metrics.features pixels",
        ["image_metrics.features='pixels'", "makes none", "leave it out"],
    ),
    "eyes without weights": (
        "--task vae --data.source digits --partition.by iid --federation.clients 2 "
        "--image_metrics.features resnet56",
        ["image_metrics.weights", "resnet56", "safetensors"],
    ),
    "too few candidates": (
        "--federation.power_of_choice 1",
        ["federation.power_of_choice=1", "must be from"],
    ),
    "first rounds that nobody may finish": (
        "--method.name fed-sb --federation.rounds 3 --devices.fails 0.5",
        ["method.name='fed-sb'", "devices.fails=(0.5,)", "leave it out"],
    ),
    "fewer candidates than a round asks": (
        "--federation.cohort 1 --federation.over_selection 2 "
        "--federation.power_of_choice 1 --devices.up 9",
        ["federation.power_of_choice=1", "must be from 2", "federation.over_selection"],
    ),
    "more than the cohort, of devices without speed": (
        "--federation.over_selection 1.5",
        ["federation.over_selection=1.5", "devices.steps_per_second"],
    ),
    "a deadline for devices without speed": (
        "--federation.deadline 9",
        ["federation.deadline=9", "devices.steps_per_second"],
    ),
    "a device that is never there": ("--devices.available 0", ["devices.available.0=0"]),
    "a device that always fails": ("--devices.fails 1", ["devices.fails.0=1"]),
    "a device that stands still": ("--devices.up 0", ["devices.up.0=0"]),
    "a buffer of more than there are": (
        "--method.name fedbuff --method.buffer 3",
        ["method.buffer=3", "at most 2"],
    ),
    "a buffer of a baseline": (
        "--evaluation.baselines fedbuff --method.buffer 3",
        ["method.buffer=3", "at most 2"],
    ),
    "candidates without rounds": (
        "--method.name fedbuff --federation.cohort 1 --federation.power_of_choice 2",
        ["federation.power_of_choice=2", "fedbuff", "leave it out"],
    ),
    "text for a model of pictures": ("--task diffusion", ["the data are text", "set data.source"]),
    "no class of pictures": (
        "--task diffusion --data.source digits --partition.by iid --federation.clients 2 "
        "--evaluation.prompts frog",
        ["evaluation.prompts='frog'", "is no class of pictures", "0, 1, 2"],
    ),
    "samples beyond the context": (
        "--evaluation.sample-tokens 100000",
        ["evaluation.sample_tokens=100000", "context", "take fewer"],
    ),
    "a limit that leaves clients out": (
        "--data.limit 1",
        ["data.limit=1", "'berta'", "raise it"],
    ),
    "no text": ("--data.text-field \udcff", ["'\\udcff'", "is not UTF-8"]),
    "no initial adapter": ("--adapter.initial /none", ["/none", "adapter_config.json"]),
    "full models stacked": (
        "--engine.name stacked --method.name fedavg-full",
        ["engine.name='stacked'", "method.name='fedavg-full'", "say serial"],
    ),
    "a stray word": ("stray", ["fedgen run cannot use 'stray' here"]),
    "a switch with a value": ("--personal.fallback false", ["'false'", "--no-NAME"]),
    "a recipe that comes late": ("late.toml", ["'late.toml'", "a recipe comes first"]),
    "a setting like no other": ("--wandb", ["'wandb'", "--help"]),
    "a misspelt option": ("--outt there", ["'outt'", "did you mean '--out'?"]),
}


@pytest.mark.parametrize(("flags", "words"), FLAGS.values(), ids=FLAGS)
def test_a_mistaken_flag_is_one_line(
    flags: str, words: list[str], texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refuses(run(texts, *flags.split()), words, capsys)


RECIPES = {
    "not TOML": ("[adapter", ["is not TOML"]),
    "unknown key": ("[adapter]\nrnak = 4", ["'adapter.rnak'", "did you mean 'adapter.rank'?"]),
    "unknown part": ("[adaptor]\nrank = 4", ["'adaptor'", "did you mean 'adapter"]),
    "rank 0": ("[adapter]\nrank = 0", ["adapter.rank=0", "greater than or equal to 1"]),
    "rate NaN": ("[training]\nlr = nan", ["training.lr=nan", "finite"]),
    "rate infinite": ("[training]\nlr = inf", ["training.lr=inf", "finite"]),
    "no part": ("adapter = 3", ["adapter=3"]),
    "no path": ('[data]\nsource = "ptb"', ["data.path is missing", "--data.path"]),
    "unknown method": ('[method]\nname = "fedporx"', ["method.name='fedporx'", "'fedprox'"]),
}


@pytest.mark.parametrize(("content", "words"), RECIPES.values(), ids=RECIPES)
def test_a_mistaken_recipe_is_one_line(
    content: str,
    words: list[str],
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = tmp_path_factory.mktemp("recipe") / "own.toml"
    recipe.write_text(content)
    refuses(["run", str(recipe)], words, capsys)


USUAL = {
    "--seed": "federation.seed",
    "--model": "backbone.path",
    "--epochs": "training.epochs",
    "--lr": "training.lr",
    "--rounds": "federation.rounds",
    "--batch-size": "training.batch",
    "--learning_rate": "training.lr",
    "--epoch": "training.epochs",
}


@pytest.mark.parametrize("typed", USUAL)
def test_what_people_type_leads_to_the_setting(
    typed: str, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refuses([*run(texts), typed, "3"], [f"did you mean {USUAL[typed]!r}?"], capsys)


def test_every_usual_name_leads_to_a_setting_or_an_option() -> None:
    known = {key for key, _ in config.iter_settings(config.Settings())} | {"--out"}
    assert set(config.COMMON_ALIASES.values()) <= known
    assert not config.COMMON_ALIASES.keys() & known


def test_a_name_that_is_near_to_nothing_is_told_of_no_other() -> None:
    assert "did you mean" not in config.describe_unknown("wandb")
    assert "did you mean" not in config.describe_unknown("quantisation.scheme")


def test_a_recipe_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    refuses(["run", "none.toml"], ["none.toml", "give a TOML file"], capsys)


# ---- mistakes in the data

DATA = {
    "empty": (b"", ["texts.jsonl is empty"]),
    "blank": (b"\n \n", ["texts.jsonl is empty"]),
    "NULs": (rows().encode() + b'{"text": "a\0b", "who": "anna"}\n', ["line 31", "NUL"]),
    "an escaped NUL": (rows().encode() + rb'{"text": "a\u0000b", "who": "b"}', ["line 31", "NUL"]),
    "a line of 10 MB": (
        rows().encode() + b'{"text": "' + b"a" * 10_000_000 + b'", "who": "anna"}\n',
        ["line 31", "longer than 1000000 bytes", "break it"],
    ),
    "not UTF-8": (rows().encode() + b"\xff\xfe\n", ["line 31", "UTF-8"]),
    "not JSON": (rows().encode() + b"{\n", ["line 31", "not JSON"]),
    "no object": (rows().encode() + b"[1]\n", ["line 31", "not a JSON object"]),
    "no such field": (b'{"body": "A text.", "who": "b"}\n', ["data.text_field='text'", "body"]),
    "a client with no text": (
        rows().encode() + b'{"text": " ", "who": "berta"}\n',
        ["'berta'", "no text", "leave them out"],
    ),
    "a client with one text": (
        (rows() + rows(1, "berta")).encode(),
        ["'berta' has 1 example", "partition.minimum=3", "lower that"],
    ),
}


@pytest.mark.parametrize(("content", "words"), DATA.values(), ids=DATA)
def test_mistaken_data_are_one_line_with_the_file_and_the_place(
    content: bytes,
    words: list[str],
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = tmp_path_factory.mktemp("data") / "texts.jsonl"
    data.write_bytes(content)
    refuses(run(data), words, capsys)


def test_data_that_are_not_there_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    refuses(run(Path("none.jsonl")), ["data.path='none.jsonl'", "does not exist"], capsys)


# ---- mistakes about a run


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_folder_that_holds_a_run_is_never_written_to(
    done: tuple[Path, str], texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = done
    before = tree(out)
    words = [f"out={str(out)!r} already holds a run", f"fedgen resume {out}"]
    refuses(run(texts, "--out", str(out)), words, capsys)
    assert tree(out) == before


def test_a_folder_that_holds_other_files_is_never_written_to(
    texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(texts.parent)
    words = ["already holds other files", "name another folder"]
    refuses(run(texts, "--out", str(texts.parent)), words, capsys)
    assert tree(texts.parent) == before


COMMANDS = {
    "no command": ("trian", ["unknown command 'trian'", "resume"]),
    "resume nothing": ("resume", ["resume", "The run's folder"]),
    "resume no run": ("resume none", ["none holds no run"]),
    "resume an empty folder": ("resume {empty}", ["holds no run", "settings.toml"]),
    "resume with a flag": ("resume {run} --adapter.rank 4", ["fedgen resume"]),
    "report nothing": ("report", ["at least one run"]),
    "report no run": ("report none", ["no run at none"]),
    "report an empty folder": ("report {empty}", ["settings.toml is missing"]),
    "generate without a prompt": ("generate {run}", ["--prompt"]),
    "generate without a run": ("generate none --prompt x", ["none holds no run"]),
    "generate for nobody": (
        "generate {run} --prompt x --client nobody",
        ["'nobody'", "anna, berta"],
    ),
    "generate nothing": (
        "generate {run} --prompt x --tokens 0",
        ["--max-new-tokens=0", "at least 1"],
    ),
    "generate at a temperature below 0": (
        "generate {run} --prompt x --temperature -1",
        ["--temperature=-1.0", "0 (the most probable token), or from 0.001"],
    ),
    "generate at no temperature": (
        "generate {run} --prompt x --temperature nan",
        ["--temperature=nan", "to 1000.0"],
    ),
    "generate from no token": ("generate {run} --prompt x --top-p 0", ["--top-p=0.0", "above 0"]),
    "generate from more than all": ("generate {run} --prompt x --top-p 2", ["--top-p=2.0"]),
    "generate from fewer than none": ("generate {run} --prompt x --top-k -1", ["--top-k=-1"]),
    "generate at a temperature that leaves the finite numbers": (
        "generate {run} --prompt x --temperature 1e-40",
        ["--temperature=1e-40", "from 0.001"],
    ),
    "generate with a penalty of 0": (
        "generate {run} --prompt x --repetition-penalty 0",
        ["--repetition-penalty=0.0", "from 0.001 to 1000.0"],
    ),
    "generate with a chat and without": (
        "generate {run} --prompt x --chat --no-chat",
        ["--chat and --no-chat"],
    ),
    "generate with two models": (
        "generate {run} --prompt x --client anna --backbone",
        ["--client and --backbone"],
    ),
    "generate a chat without a template": (
        "generate {run} --prompt x --chat",
        ["has no chat template", "leave --chat out"],
    ),
    "generate for a misspelt client": (
        "generate {run} --prompt x --client bertha",
        ["'bertha'", "did you mean 'berta'?"],
    ),
    "generate pictures of text": ("generate {run} --class 3", ["--class='3'", "say --prompt"]),
    "generate with a misspelt option": (
        "generate {run} --prompt x --temprature 1",
        ["no option --temprature", "did you mean '--temperature'?"],
    ),
    "generate with a short option": ("generate {run} -x 3", ["no option -x", "--help"]),
    "generate from two runs": ("generate {run} {run} --prompt x", ["cannot use", "--help"]),
    "generate beyond the context": (
        "generate {run} --prompt x --tokens 99999",
        ["99999 tokens after a prompt", "context"],
    ),
    "pretrain text in place": (
        "pretrain {run}/settings.toml",
        ["--out is missing", "stays as it is"],
    ),
    "export no run": ("export none --out copy", ["none holds no run"]),
    "export of nobody": ("export {run} --out copy --client nobody", ["'nobody'", "anna, berta"]),
    "export over a run": ("export {run} --out {run}", ["already holds a run", "folder by --out"]),
    "export over files": ("export {run} --out {run}/adapters", ["holds files", "folder by --out"]),
    "resume a misspelt run": ("resume nonesuch", ["nonesuch holds no run"]),
}


@pytest.mark.parametrize(("line", "words"), COMMANDS.values(), ids=COMMANDS)
def test_a_mistaken_command_is_one_line(
    line: str,
    words: list[str],
    done: tuple[Path, str],
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = line.format(run=done[0], empty=tmp_path_factory.mktemp("empty")).split()
    refuses(arguments, words, capsys)


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("settings.toml", "[adapter", "is not TOML"),
        ("run.json", "{", "run.json"),
        ("run.json", "{}", "run.json"),
        ("run.json", "[]", "run.json"),
        ("run.json", '{"backbone": {"sha256": "of another"}}', "backbone.sha256 was of another"),
    ],
)
def test_a_run_whose_files_were_altered_is_refused(
    name: str,
    content: str,
    word: str,
    done: tuple[Path, str],
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy = tmp_path_factory.mktemp("runs") / "copy"
    shutil.copytree(done[0], copy)
    (copy / name).write_text(content)
    refuses(["resume", str(copy)], [word], capsys)


@pytest.mark.parametrize(
    ("act", "told"),
    [
        (lambda: torch.empty(2**48), True),  # more than a process can address
        (lambda: bytearray(2**62), True),
        (lambda: torch.empty(2) @ torch.empty(3), False),
    ],
)
def test_no_room_is_told_from_other_errors(act: Callable[[], object], told: bool) -> None:
    with pytest.raises((MemoryError, RuntimeError)) as caught:
        act()
    assert is_out_of_memory(caught.value) == told


def test_no_room_for_a_model_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def grows(arguments: list[str]) -> None:
        torch.empty(2**48)

    monkeypatch.setattr(cli, "run", grows)
    refuses(["run"], ["out of memory", "engine.stack", "fedgen resume"], capsys)


# ---- how it explains itself


def test_the_package_runs_as_a_module(capsys: pytest.CaptureFixture[str]) -> None:
    told = [sys.executable, "-m", "fedgen_edge", "--help"]
    module = subprocess.run(told, capture_output=True, text=True, check=False)
    assert (module.returncode, module.stderr) == (0, "")
    assert module.stdout == says(["--help"], capsys)


def test_bash_completes_commands_and_options() -> None:
    told = [sys.executable, "-m", "fedgen_edge", "--tyro-print-completion", "bash"]
    script = subprocess.run(told, capture_output=True, text=True, check=False)
    assert (script.returncode, script.stderr) == (0, "")
    lines = [
        "",
        "generate --temp",
        "deploy re",
        "deploy init --add",
    ]
    ask = script.stdout + "".join(
        f"\nCOMP_WORDS=(fedgen {line or chr(34) * 2}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))\n"
        "eval \"$(complete -p fedgen | sed -E 's/.*-F ([^ ]+).*/\\1/')\"\n"
        'echo "${COMPREPLY[@]}"\n'
        for line in lines
    )
    asked = subprocess.run(["bash"], input=ask, capture_output=True, text=True, check=True)
    commands, *options = asked.stdout.splitlines()
    assert set(cli.COMMANDS) <= set(commands.split())
    assert [option.split() for option in options] == [["--temperature"], ["revoke"], ["--address"]]


def test_a_shell_without_completion_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    refuses(["--tyro-print-completion", "csh"], ["'csh'", "bash, zsh, fish"], capsys)
    refuses(["run", "--tyro-print-completion"], ["bash, zsh, fish"], capsys)


# Python says of a module that is None in sys.modules what it says of one that is not installed.
@pytest.mark.parametrize("library", ["torch", "transformers"])
@pytest.mark.parametrize("line", ["methods", "run --out never --backbone.path tiny"])
def test_a_library_that_is_not_installed_is_one_line(library: str, line: str) -> None:
    if (library, line) == ("transformers", "methods"):
        pytest.skip("nothing of transformers is needed")
    code = f"import sys; sys.modules[{library!r}] = None\n"
    code += f"from fedgen_edge.cli.main import main; main({line.split()!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"fedgen: {library} is not installed: pip install {library}\n"


QUICK = {
    "generate for nobody": "generate {run} --prompt x --client nobody",
    "generate no tokens": "generate {run} --prompt x --tokens 0",
    "generate without a run": "generate none --prompt x",
    "export of nobody": "export {run} --client nobody --out there",
    "resume no run": "resume none",
    "server of nothing": "server none",
    "report no run": "report none",
    "status of nothing": "status none",
    "an unknown setting": "run --wandb",
    "a bad plan": "plan --memory 0",
}


def test_mistakes_are_told_before_anything_heavy_is_loaded(done: tuple[Path, str]) -> None:
    lines = [line.format(run=done[0]) for line in QUICK.values()]
    code = (
        "import sys\nfrom fedgen_edge.cli.main import main\n"
        f"for line in {lines!r}:\n"
        "    try: main(line.split())\n"
        "    except SystemExit as ended: print(line, ended.code, 'torch' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines() == [f"{line} 2 False" for line in lines]


def test_help_names_every_command_and_needs_no_heavy_library() -> None:
    code = (
        "import json, sys; from fedgen_edge.cli.main import main; main(['--help']); "
        "print(json.dumps(sorted({'torch', 'transformers', 'peft'} & set(sys.modules))))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    *usage, heavy = found.stdout.splitlines()
    assert (found.returncode, found.stderr, json.loads(heavy)) == (0, "", [])
    for name, about in cli.COMMANDS.items():
        assert any(f"fedgen {name} " in line and about in line for line in usage)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_is_printed_when_asked_for_or_when_there_is_nothing_to_do(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert says(arguments, capsys).startswith("usage: fedgen COMMAND")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_commands_help_explains_every_setting(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as caught:
        cli.main([name, "--help"])
    said, complained = capsys.readouterr()
    assert (caught.value.code or 0, complained) == (0, "")
    page = FRAME.sub(" ", said)
    modules = (cli, models, plan, deploy)
    told = [text for module in modules for text in sentences(module, name.capitalize())]
    assert told or name in {"deploy"}
    if name == "run":
        told += sentences(config)
        for setting, _ in config.iter_settings(config.Settings()):
            assert re.search(rf"--{setting.replace('_', '-')}[ ,]", page)
    assert [sentence for sentence in told if sentence not in page] == []


def sentences(module: ModuleType, only: str = "") -> list[str]:
    """The string under each field of one class, or of all."""
    kinds = [n for n in ast.parse(inspect.getsource(module)).body if isinstance(n, ast.ClassDef)]
    found = []
    for field, after in (
        pair for kind in kinds if only in {"", kind.name} for pair in pairwise(kind.body)
    ):
        match field, after:
            case ast.AnnAssign(), ast.Expr(value=ast.Constant(value=str(text))):
                found.append(" ".join(text.split()))
            case _:
                pass
    return found


def test_imports_are_not_looked_through_for_cycles_and_what_follows_is() -> None:
    told = (
        "import gc; from fedgen_edge.cli.main import speed_up_imports\n"
        "with speed_up_imports(): off = not gc.isenabled(); import torch\n"
        "seen = gc.get_freeze_count()\n"
        "with speed_up_imports(): on = gc.isenabled()\n"
        "print(off, on, gc.isenabled(), seen > 10_000, gc.get_freeze_count() == seen)"
    )
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"] * 5
