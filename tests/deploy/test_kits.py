"""A deployment's folders: whole, private, and what each program that reads them expects."""

import contextlib
import io
import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from importlib.resources import files as resources
from pathlib import Path

import pytest
import yaml

from fedgen_edge import __version__, config
from fedgen_edge.cli import main as cli
from fedgen_edge.config import Settings, load
from fedgen_edge.deploy.members import read_member_keys
from fedgen_edge.deploy.provision import kits
from fedgen_edge.deploy.provision.address import parse_address
from fedgen_edge.deploy.settings import (
    DeploymentSettings,
    SiteSettings,
    hash_settings,
    load_site_settings,
    read,
)
from fedgen_edge.errors import ConfigError

RECIPE = """
[backbone]
path = "tiny"
[data]
source = "jsonl"
path = "mine.jsonl"
[federation]
rounds = 2
clients = 2
"""


@pytest.fixture
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A recipe's file, out of the folder that a test works in."""
    path = tmp_path_factory.mktemp("recipe") / "own.toml"
    path.write_text(RECIPE)
    return str(path)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def init(recipe: str, *more: str, sites: str = "north,south") -> Path:
    """The folder that the command makes."""
    told = [recipe, "--sites", sites, "--address", "fed.example.org:8443", "--out", "fed", *more]
    with contextlib.redirect_stdout(io.StringIO()):
        cli.main(["deploy", "init", *told])
    return Path("fed").absolute()


@pytest.fixture
def fed(recipe: str) -> Path:
    """A server's folder, its sites north and south."""
    return init(recipe)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
    }


def refuses(
    arguments: Sequence[str], words: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """One line with these words, exit 2, nothing written."""
    before = tree(Path.cwd())
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    said, complained = capsys.readouterr()
    assert (caught.value.code, said) == (2, "")
    assert re.fullmatch(r"fedgen: [^\n]+\n", complained)
    assert [word for word in words if word not in complained] == []
    assert tree(Path.cwd()) == before


# ---- what is made

SOFTWARE = {"software/requirements.txt", f"software/fedgen_edge-{__version__}-py3-none-any.whl"}
KIT = SOFTWARE | {
    "site.toml", "recipe.toml", "ca.crt", "key", "key.pub", "secret", "fedgen-client.service",
    "README.md",
}  # fmt: skip
SERVER = SOFTWARE | {
    "federation.toml", "recipe.toml", "ca/ca.crt", "ca/ca.key", "tls/server.crt", "tls/server.key",
    "secret", "sites/north.pub", "sites/south.pub", "revoked", "proxy/nginx.conf", "proxy/temp",
    "systemd/fedgen-server.service", "systemd/fedgen-proxy.service", "compose.yaml",
    "software/Dockerfile", "README.md",
}  # fmt: skip


def test_the_folder_has_what_the_server_needs_and_a_kit_for_each_site(fed: Path) -> None:
    leaves = {
        path for path in tree(fed) if not (fed / path).is_dir() or not any((fed / path).iterdir())
    }
    assert leaves == SERVER | {f"kits/{name}/{path}" for name in ("north", "south") for path in KIT}


def test_the_settings_in_it_are_read_back_and_equal_at_all_sites(fed: Path) -> None:
    federation = read(DeploymentSettings, fed / "federation.toml")
    assert (federation.address, federation.port) == ("fed.example.org:8443", 18443)
    for name in ("north", "south"):
        kit = fed / "kits" / name
        site = read(SiteSettings, kit / "site.toml")
        assert (site.name, site.server, site.own) == (name, "fed.example.org:8443", {})
        assert hash_settings(load_site_settings(kit, site)) == hash_settings(
            load(fed / "recipe.toml")
        )
        assert (kit / "recipe.toml").read_bytes() == (fed / "recipe.toml").read_bytes()
        assert (kit / "ca.crt").read_bytes() == (fed / "ca" / "ca.crt").read_bytes()
        assert (kit / "key.pub").read_bytes() == (fed / "sites" / f"{name}.pub").read_bytes()


def test_a_sites_own_data_are_named_where_its_readme_says(fed: Path) -> None:
    kit = fed / "kits" / "north"
    lines = (kit / "README.md").read_text().splitlines()
    at = lines.index("    [own]")
    own = "\n".join(line.strip() for line in lines[at + 1 : at + 2])
    (kit / "site.toml").write_text((kit / "site.toml").read_text() + own + "\n")
    settings = load_site_settings(kit, read(SiteSettings, kit / "site.toml"))
    assert settings.data.path == "/srv/data/north"
    assert load(fed / "recipe.toml").data.path is None


def test_sites_are_the_clients_and_the_servers_paths_begin_at_the_root(
    here: Path, recipe: str
) -> None:
    (here / "model").mkdir()
    settings = load(init(recipe, "--backbone.path", "model") / "recipe.toml")
    assert settings.backbone.path == str(here / "model")
    assert settings.federation.clients is None


def test_every_key_and_secret_is_made_once(fed: Path) -> None:
    made = [fed / "secret", fed / "ca" / "ca.key", fed / "tls" / "server.key"]
    made += [
        fed / "kits" / name / file for name in ("north", "south") for file in ("key", "secret")
    ]
    assert len({path.read_bytes() for path in made}) == 7
    elsewhere = [text for path, text in tree(fed).items() if fed / path not in made]
    for path in made:
        assert not any(path.read_bytes().strip() in text for text in elsewhere)


@contextlib.contextmanager
def umask(bits: int) -> Iterator[None]:
    before = os.umask(bits)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize("bits", [0o000, 0o022, 0o077])
def test_only_the_owner_reads_anything_whatever_the_umask(bits: int, recipe: str) -> None:
    with umask(bits):
        fed = init(recipe)
        cli.main(["deploy", "add", "east", str(fed)])
        cli.main(["deploy", "revoke", "north", str(fed)])
        assert os.umask(bits) == bits
    for path in [fed, *fed.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_a_number_of_sites_names_them(recipe: str) -> None:
    fed = init(recipe, "--federation.clients", "3", sites="3")
    assert list(read_member_keys(fed)) == ["site-1", "site-2", "site-3"]


def test_nothing_secret_is_printed(recipe: str, capfd: pytest.CaptureFixture[str]) -> None:
    cli.main(["deploy", "init", recipe, "--sites", "2", "--address", "127.0.0.1:8443"])
    cli.main(["deploy", "add", "east", "federation"])
    said = "".join(capfd.readouterr())
    assert said.splitlines() == [
        "server    federation",
        "kit       federation/kits/site-1",
        "kit       federation/kits/site-2",
        "next      federation/README.md",
        "kit       federation/kits/east",
    ]


def test_the_folder_appears_whole_or_not_at_all(
    recipe: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_bytes, written = Path.write_bytes, []

    def fails(path: Path, content: bytes) -> int:
        written.append(path)
        if len(written) == 20:
            raise OSError(28, "No space left on device")
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", fails)
    told = ["deploy", "init", recipe, "--sites", "2", "--address", "127.0.0.1:8443"]
    refuses(told, ["No space left"], capsys)
    assert len(written) == 20


# ---- add and revoke


def test_a_site_is_added_with_a_key_of_its_own(fed: Path) -> None:
    before = read_member_keys(fed)
    cli.main(["deploy", "add", "east", str(fed)])
    after = read_member_keys(fed)
    assert list(after) == ["east", "north", "south"]
    assert len(set(after.values())) == 3
    assert {name: after[name] for name in before} == before
    kit = fed / "kits" / "east"
    assert {str(path.relative_to(kit)) for path in kit.rglob("*") if path.is_file()} == KIT
    assert (kit / "key.pub").read_bytes() == after["east"]
    assert (kit / "recipe.toml").read_bytes() == (fed / "recipe.toml").read_bytes()


def test_a_revoked_sites_key_moves_and_the_others_stay(
    fed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = read_member_keys(fed)
    cli.main(["deploy", "revoke", "north", str(fed)])
    assert "within a few seconds" in capsys.readouterr().out
    assert read_member_keys(fed) == {"south": before["south"]}
    assert {p.name for p in (fed / "sites").iterdir()} == {"south.pub"}
    assert (fed / "revoked" / "north.pub").read_bytes() == before["north"]


def test_a_site_whose_revocation_was_cut_short_takes_no_part_and_is_revoked_again(
    fed: Path,
) -> None:
    shutil.copy(fed / "sites" / "north.pub", fed / "revoked" / "north.pub")
    assert list(read_member_keys(fed)) == ["south"]
    cli.main(["deploy", "revoke", "north", str(fed)])
    assert not (fed / "sites" / "north.pub").exists()


def test_a_kit_whose_making_was_cut_short_is_made_again(fed: Path) -> None:
    (fed / "kits" / "east").mkdir()
    (fed / "kits" / "east" / "key").write_text("half")
    cli.main(["deploy", "add", "east", str(fed)])
    assert (fed / "kits" / "east" / "key").read_bytes().startswith(b"-----BEGIN OPENSSH")


MISTAKES = {
    "add one that is there": ("add north {fed}", ["site='north'", "is there already"]),
    "add one that is there in capitals": ("add North {fed}", ["site='North'", "'north'"]),
    "add one that was revoked": ("add Gone {fed}", ["site='Gone'", "as 'gone'", "Gone-2"]),
    "add a path": ("add ../up {fed}", ["site='../up'", "letters"]),
    "add one with a dot": ("add a.b {fed}", ["site='a.b'"]),
    "add one too long": (f"add {'n' * 64} {{fed}}", ["at most 63"]),
    "add to nothing": ("add east none", ["federation.toml is missing", "deploy init"]),
    "add without a folder": ("add east", ["The server's"]),
    "revoke one that is not there": ("revoke east {fed}", ["'east' is no site", "north, south"]),
    "revoke in other letters": ("revoke NORTH {fed}", ["'NORTH' is no site", "north, south"]),
    "revoke twice": ("revoke gone {fed}", ["'gone' was revoked already"]),
    "revoke a path": ("revoke ../secret {fed}", ["'../secret' is no site"]),
    "revoke from nothing": ("revoke north none", ["federation.toml is missing"]),
    "no such command": ("start", ["unknown command 'deploy start'", "init, add, revoke"]),
    "no such option": ("add east {fed} --key k", ["fedgen deploy add has no option --key"]),
}


@pytest.mark.parametrize(("arguments", "words"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_about_a_site_is_one_line_and_changes_nothing(
    arguments: str, words: list[str], fed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["deploy", "add", "gone", str(fed)])
    cli.main(["deploy", "revoke", "gone", str(fed)])
    capsys.readouterr()
    refuses(["deploy", *arguments.format(fed=fed).split()], words, capsys)


# ---- mistakes in setting up

SETUP = {
    "no sites": ("--sites 0", ["sites=0", "from 1 to 500"]),
    "fewer than none": ("--sites=-1", ["sites=-1", "from 1 to 500"]),
    "too many sites": ("--sites 100000", ["sites=100000", "from 1 to 500"]),
    "a number beyond numbers": (f"--sites {'9' * 5000}", ["must be from 1 to 500"]),
    "an empty name": ("--sites north,,south", ["site=''", "letters"]),
    "a name with a slash": ("--sites north,a/b", ["site='a/b'", "letters"]),
    "a name from another alphabet": ("--sites nord,süd", ["site='süd'", "letters"]),
    "a name twice": ("--sites north,NORTH", ["site='NORTH'", "'north'", "another name"]),
    "no port": ("--address fed.example.org", ["'fed.example.org'", "HOST:PORT"]),
    "port 0": ("--address fed.example.org:0", ["HOST:PORT"]),
    "a port too high": ("--address fed.example.org:65536", ["HOST:PORT"]),
    "a scheme": ("--address https://fed.example.org:443", ["HOST:PORT"]),
    "no host": ("--address :443", ["HOST:PORT"]),
    "an IP address that is none": ("--address 192.0.2.300:443", ["HOST:PORT"]),
    "a bare IPv6 address": ("--address 2001:db8::7:443", ["HOST:PORT", "[2001:db8::7]"]),
    "an IPv4 address in brackets": ("--address [192.0.2.7]:443", ["HOST:PORT"]),
    "a name that is none": ("--address=-fed.example.org:443", ["HOST:PORT"]),
    "words for nginx": ("--address a;b:443", ["HOST:PORT"]),
    "every address": ("--address 0.0.0.0:443", ["is no machine's"]),
    "Flower's port": ("--address fed.example.org:18443", ["port=18443", "not the address's"]),
    "no port of Flower's": ("--port 0", ["port=0", "from 1 to 65535"]),
    "a folder that is there": ("--out .", ["out='.' is there already", "deploy add"]),
    "a folder with a line break": ("--out a\nb", ["line break"]),
    "a mistaken setting": ("--adapter.rnak 3", ["adapter.rnak", "adapter.rank"]),
    "a setting out of bounds": ("--adapter.rank 0", ["adapter.rank=0"]),
    "another number of clients": ("--federation.clients 3", ["federation.clients=3", "sites, 2"]),
    "baselines": ("--evaluation.baselines fedper", ["evaluation.baselines=", "nothing after it"]),
    "training alone": ("--method.name local-only", ["method.name='local-only'", "fedgen run"]),
    "one learner": ("--method.name centralised", ["method.name='centralised'", "fedgen run"]),
    "no method": ("--method.name fedporx", ["method.name='fedporx'", "'fedprox'"]),
    "no rounds": ("--method.name fedbuff", ["method.name='fedbuff'", "virtual clock"]),
    "slow devices": ("--devices.up 100", ["devices.up=(100.0,)", "leave it out"]),
    "more than the cohort": (
        "--federation.over_selection 1.3",
        ["federation.over_selection=1.3", "over_selection"],
    ),
    "a deadline of a clock": ("--federation.deadline 9", ["federation.deadline=9", "leave it out"]),
    "candidates": (
        "--federation.power_of_choice 2",
        ["federation.power_of_choice=2", "leave it out"],
    ),
    "newcomers": ("--federation.unseen_clients 1", ["federation.unseen_clients=1", "deploy add"]),
    "a cohort of more": ("--federation.cohort 3", ["federation.cohort=3", "at most 2"]),
    "judging": (
        "--image_metrics.features pixels",
        ["image_metrics.features='pixels'", "leave it out"],
    ),
    "classes without names": ("--task vae --data.source images", ["data.names=()", "its own way"]),
    "prompts that are no classes": (
        "--task vae --data.source digits --data.names 0 1 --evaluation.prompts 7",
        ["evaluation.prompts=('7',)", "0, 1 are"],
    ),
}


@pytest.mark.parametrize(("arguments", "words"), SETUP.values(), ids=SETUP)
def test_a_mistake_in_setting_up_is_one_line_and_writes_nothing(
    arguments: str, words: list[str], recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    told = {"--sites": "north,south", "--address": "fed.example.org:8443"}
    given = arguments.split(" ")
    rest = [p for k, v in told.items() if not any(a.startswith(k) for a in given) for p in (k, v)]
    refuses(["deploy", "init", recipe, *given, *rest], words, capsys)


def test_a_recipe_is_wanted_and_must_be_there(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    told = ["--sites", "2", "--address", "fed.example.org:8443"]
    refuses(["deploy", "init", *told], ["needs a recipe first"], capsys)
    refuses(["deploy", "init", "none.toml", *told], ["none.toml"], capsys)
    refuses(["deploy", "init", recipe], ["--sites is missing"], capsys)
    refuses(["deploy", "init", recipe, "--sites", "2"], ["--address is missing"], capsys)


def test_a_folder_that_is_there_is_left_as_it_is(
    fed: Path, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    told = ["--sites", "north,south", "--address", "fed.example.org:8443", "--out", "fed"]
    refuses(["deploy", "init", recipe, *told], ["out='fed' is there already"], capsys)
    os.symlink("nowhere", "link")
    told[-1] = "link"
    refuses(["deploy", "init", recipe, *told], ["out='link' is there already"], capsys)


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "recipes").glob("*.toml")))
def test_recipes_that_come_with_the_package_are_deployed_or_say_what_to_change(path: Path) -> None:
    settings = load(path)
    table = config.to_table(settings)
    table["evaluation"]["baselines"] = []
    table["federation"] |= {"cohort": 2}
    table["federation"].pop("clients", None)
    table["image_metrics"].pop("features", None)
    if settings.task != "language":
        with pytest.raises(ConfigError, match=r"data\.names"):
            kits.check_deployable(config.from_table(table), 2)
        table["data"]["names"] = [str(number) for number in range(10)]
    kits.check_deployable(config.from_table(table), 2)


# ---- where sites reach the server

LISTENS = {
    "fed.example.org:8443": "8443 ssl",
    "192.0.2.7:443": "443 ssl",
    "[2001:db8::7]:443": "[::]:443 ssl ipv6only=off",
    "127.0.0.1:8443": "127.0.0.1:8443 ssl",
    "localhost:8443": "127.0.0.1:8443 ssl",
    "[::1]:8443": "[::1]:8443 ssl ipv6only=off",
}


@pytest.mark.parametrize(("address", "listen"), LISTENS.items())
def test_a_loopbacks_address_is_served_to_this_machine_alone(address: str, listen: str) -> None:
    assert parse_address(address).listen == listen


# ---- what other programs say of the files


def test_the_templates_are_part_of_the_package() -> None:
    made = {path.name for path in (resources("fedgen_edge.deploy") / "templates").iterdir()}
    used = {"nginx.conf", "compose.yaml", "Dockerfile", "README.md", "kit.md", "hardened"}
    units = {f"fedgen-{name}.service" for name in ("server", "proxy", "client")}
    assert made == {f"{name}.jinja" for name in used | units}


@pytest.mark.parametrize("folder", ["plain", "with space", 'a % $HOME "b" \\c'])
def test_systemd_takes_the_units(folder: str, here: Path, recipe: str) -> None:
    if not (analyze := shutil.which("systemd-analyze")):
        pytest.skip("systemd-analyze is not installed")
    told = ["--sites", "north", "--address", "fed.example.org:443", "--federation.clients", "1"]
    with contextlib.redirect_stdout(io.StringIO()):
        cli.main(["deploy", "init", recipe, *told, "--out", folder])
    program = here / "fedgen"
    program.touch(0o755)
    units = [*(here / folder / "systemd").iterdir(), *(here / folder).glob("kits/*/*.service")]
    assert len(units) == 3
    for unit in units:
        text = unit.read_text()
        for path in ("/srv/fedgen/venv/bin/fedgen", str(Path(sys.executable).parent / "fedgen")):
            text = text.replace(path, str(program))
        (here / unit.name).write_text(text.replace("/usr/sbin/nginx", str(program)))
        done = subprocess.run(
            [analyze, "verify", "--man=no", here / unit.name],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stdout + done.stderr) == (0, "")


def options(unit: str) -> dict[str, str]:
    """What a unit sets, the last of each."""
    return dict(line.split("=", 1) for line in unit.splitlines() if re.match(r"[A-Z]\w+=", line))


def test_services_are_hardened_and_never_roots(fed: Path) -> None:
    for path in [*(fed / "systemd").iterdir(), fed / "kits" / "north" / "fedgen-client.service"]:
        told = options(path.read_text())
        assert told["User"] not in {"root", "0"}
        assert told["ProtectSystem"] == "strict"
        assert told["NoNewPrivileges"] == told["PrivateTmp"] == "true"
        assert told["CapabilityBoundingSet"] == ""
        assert told["Restart"] in {"always", "on-failure"}


@pytest.mark.parametrize(
    ("number", "service", "container"),
    [(0, "fedgen", "${FEDGEN_USER:?"), (2**31 - 5, str(2**31 - 5), f"{2**31 - 5}:")],
    ids=["made by root", "made by an account without a name"],
)
def test_services_run_as_who_made_the_folder_but_root_runs_none(
    number: int, service: str, container: str, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getuid", lambda: number)
    fed = init(recipe)
    assert {options(p.read_text())["User"] for p in (fed / "systemd").iterdir()} == {service}
    services = yaml.safe_load((fed / "compose.yaml").read_text())["services"]
    assert [each["user"].startswith(container) for each in services.values()] == [True, True]
    assert ("useradd" in (fed / "README.md").read_text()) == (number == 0)


def test_only_a_proxy_on_a_low_port_gets_a_privilege(recipe: str) -> None:
    told = [recipe, "--sites", "2", "--address", "fed.example.org:443", "--out", "low"]
    cli.main(["deploy", "init", *told])
    units = {p.name: options(p.read_text()) for p in Path("low/systemd").iterdir()}
    assert units["fedgen-proxy.service"]["AmbientCapabilities"] == "CAP_NET_BIND_SERVICE"
    assert units["fedgen-server.service"]["CapabilityBoundingSet"] == ""


def test_compose_names_files_that_are_there_and_gives_the_proxy_no_secret(fed: Path) -> None:
    services = yaml.safe_load((fed / "compose.yaml").read_text())["services"]
    assert (fed / services["server"]["build"] / "Dockerfile").is_file()
    proxy = [volume.split(":") for volume in services["proxy"]["volumes"]]
    for here, there, mode in proxy:
        assert (fed / here).exists()
        assert there == f"/federation/{here.removeprefix('./')}"
        assert mode == "ro"
    assert {here for here, *_ in proxy} == {"./proxy/nginx.conf", "./tls", "./ca/ca.crt"}
    assert services["server"]["ports"] == ["8443:8443"]
    assert "ports" not in services["proxy"]


def test_a_backbone_in_a_folder_is_there_in_the_container_too(here: Path, recipe: str) -> None:
    (here / "a model").mkdir()
    fed = init(recipe, "--backbone.path", "a model")
    server = yaml.safe_load((fed / "compose.yaml").read_text())["services"]["server"]
    assert f"{here}/a model:{here}/a model:ro" in server["volumes"]


def test_pages_have_no_hole_and_name_their_commands(fed: Path) -> None:
    server, kit = ((fed / path).read_text() for path in ("README.md", "kits/north/README.md"))
    for command in (f"fedgen server {fed}", f"fedgen deploy add NAME {fed}", "rm -r kits/north"):
        assert f"    {command}" in server or command in server
    assert "    fedgen client ." in kit
    for page in (server, kit):
        assert not re.search(r"\{[{%]|None|Undefined", page)


def test_toml_of_the_recipe_is_the_settings_themselves(fed: Path) -> None:
    table = tomllib.loads((fed / "recipe.toml").read_text())
    assert config.from_table(table) == kits.make_shared_settings(
        config.from_table(tomllib.loads(RECIPE))
    )
    assert isinstance(load(fed / "recipe.toml"), Settings)


@pytest.mark.parametrize("name", ["init", "add", "revoke"])
def test_help_of_each_command_is_printed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["deploy", name, "--help"])
    assert caught.value.code in {0, None}
    assert f"fedgen deploy {name}" in capsys.readouterr().out
