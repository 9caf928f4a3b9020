"""Count how the package is named and laid out, and hold the counts to their limits.

`python tools/house_language.py` prints the counts; `--check` also lists every offender and exits
with 1 where a limit is passed; `--list` writes the offenders as lines of JSON.

A function is a verb phrase or a published method's name, so a name made of participles alone
(`judged`, `sent_up`) says neither what it does nor what it gives. A binding that outlives three
lines says what it holds, so a pronoun-like word (`found`, `own`) is no name for it. A class name
has one meaning in the whole package. Names within other names (`judge_samples`, `found_files`) are
left to the reader's judgement.
"""

import argparse
import ast
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

LIMITS = {
    "participle functions, %": 1.0,
    "pronoun bindings, %": 0.5,
    "class names with two meanings": 4,
    "largest folder, files": 17,
    "loose modules": 8,
}
LASTING = 3
"""Lines that a binding must outlive to be counted."""


def words(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


PRONOUNS = words("""
    found told own each said made asked done given taken kept mine whole rest theirs ours others one
""")
"""Words that point at something instead of saying what it is."""
IRREGULAR = words("""
    begun born bought bound broken brought built called caught chosen dealt done drawn driven fallen
    felt found given gone grown heard held kept known laid learnt led left lent lost made meant met
    paid said seen sent shown sold spent spoken stood taken taught thought thrown told understood
    went won worn written came got
""")
"""Participles and pasts that do not end in -ed or -ing."""
VERBS = words("feed seed need speed embed exceed proceed succeed bring string ring thing during")
"""Words that end as participles do, and are none."""
PARTICLES = words("up down in out on off over by to from of at with as so not yet too")


@dataclass(frozen=True)
class Offender:
    """A name that a limit counts, and where it is bound."""

    kind: str
    file: str
    line: int
    scope: str
    name: str


@dataclass(frozen=True)
class Binding:
    """A name, the scope that binds it, the line where it does first, and the last that uses it."""

    name: str
    line: int
    last: int
    scope: str


def is_participle(word: str) -> bool:
    """Whether a lower-case word is a participle, present or past, and nothing else."""
    if word in VERBS:
        return False
    return word in IRREGULAR or (len(word) > 4 and word.endswith(("ed", "ing")))


def is_bare(name: str) -> bool:
    """Whether a function's name is made of participles and particles alone."""
    parts = [part for part in name.lower().split("_") if part]
    return any(map(is_participle, parts)) and all(
        is_participle(part) or part in PARTICLES for part in parts
    )


class Scopes(ast.NodeVisitor):
    """Functions, classes and bindings of one file, each with the scope that holds it."""

    def __init__(self) -> None:
        self.path: list[str] = []
        self.functions: list[Binding] = []
        self.classes: list[Binding] = []
        self.bindings: list[Binding] = []

    def visit(self, node: ast.AST) -> None:
        """Note what a module, a class or a function binds, and go on within."""
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            self.functions.append(self._binding(node.name, node))
            self._enter(node, node.args)
        elif isinstance(node, ast.ClassDef):
            self.classes.append(self._binding(node.name, node))
            self._enter(node, None)
        else:
            if isinstance(node, ast.Module):
                self._bind(node.body, end=10**9)
            self.generic_visit(node)

    def _binding(self, name: str, node: ast.stmt | ast.arg, end: int | None = None) -> Binding:
        return Binding(name, node.lineno, end or node.end_lineno or 0, ".".join(self.path))

    def _enter(
        self,
        node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef,
        arguments: ast.arguments | None,
    ) -> None:
        self.path.append(node.name)
        if arguments is not None:
            optional = [one for one in (arguments.vararg, arguments.kwarg) if one]
            named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *optional]
            self.bindings += [
                self._binding(argument.arg, argument, node.end_lineno)
                for argument in named
                if argument.arg not in ("self", "cls")
            ]
        self._bind(node.body, end=0 if arguments else node.end_lineno or 0)
        self.generic_visit(node)
        self.path.pop()

    def _bind(self, body: list[ast.stmt], end: int) -> None:
        """Note the names that a scope binds by itself; with an end, they last until there."""
        first: dict[str, int] = {}
        last: dict[str, int] = {}
        for node in walk_scope(body):
            if isinstance(node, ast.Name):
                if isinstance(node.ctx, ast.Store):
                    first.setdefault(node.id, node.lineno)
                last[node.id] = max(last.get(node.id, 0), node.lineno)
        scope = ".".join(self.path)
        self.bindings += [
            Binding(name, line, end or last[name], scope) for name, line in first.items()
        ]


def walk_scope(body: list[ast.stmt]) -> Iterator[ast.AST]:
    """Every node under these statements; of functions and classes among them, what they read."""
    waiting: list[ast.AST] = list(body)
    while waiting:
        node = waiting.pop(0)
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            for inner in ast.walk(node):
                if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Load):
                    yield inner
        else:
            waiting.extend(ast.iter_child_nodes(node))


def read_modules(root: Path) -> dict[str, Scopes]:
    """The scopes of every module under a package's folder, by path within it."""
    modules = {}
    for file in sorted(root.rglob("*.py")):
        scopes = modules[file.relative_to(root).as_posix()] = Scopes()
        scopes.visit(ast.parse(file.read_text(encoding="utf-8")))
    return modules


def find_offenders(modules: dict[str, Scopes]) -> list[Offender]:
    """Every name that a limit counts."""
    offenders: list[Offender] = []
    classes: dict[str, list[Offender]] = defaultdict(list)
    for file, scopes in modules.items():
        offenders += [
            Offender("participle", file, bound.line, bound.scope, bound.name)
            for bound in scopes.functions
            if is_bare(bound.name)
        ]
        offenders += [
            Offender("pronoun", file, bound.line, bound.scope, bound.name)
            for bound in scopes.bindings
            if bound.name.strip("_") in PRONOUNS and bound.last - bound.line > LASTING
        ]
        for bound in scopes.classes:
            if not bound.scope:
                classes[bound.name].append(Offender("class", file, bound.line, "", bound.name))
    return offenders + [place for same in classes.values() if len(same) > 1 for place in same]


def count(root: Path, modules: dict[str, Scopes], offenders: list[Offender]) -> dict[str, float]:
    """The figures that LIMITS bounds, and the sizes beside them."""
    kinds = Counter(offender.kind for offender in offenders)
    functions = sum(len(scopes.functions) for scopes in modules.values())
    bindings = sum(len(scopes.bindings) for scopes in modules.values())
    folders = Counter(str(Path(file).parent) for file in modules if "__init__" not in file)
    return {
        "modules": len(modules),
        "lines": sum(len((root / file).read_text().splitlines()) for file in modules),
        "functions": functions,
        "bindings": bindings,
        "participle functions, %": round(100 * kinds["participle"] / functions, 2),
        "pronoun bindings, %": round(100 * kinds["pronoun"] / bindings, 2),
        "class names with two meanings": len({o.name for o in offenders if o.kind == "class"}),
        "largest folder, files": max(
            (n for folder, n in folders.items() if folder != "."), default=0
        ),
        "loose modules": folders["."],
    }


def main() -> int:
    """Print the counts; with `--check`, 1 where one passes its limit."""
    parser = argparse.ArgumentParser(description="Count how a package is named and laid out.")
    parser.add_argument("root", nargs="?", default="src/fedgen_edge", type=Path)
    parser.add_argument("--check", action="store_true", help="hold the counts to their limits")
    parser.add_argument("--list", action="store_true", help="the offenders as lines of JSON")
    options = parser.parse_args()
    modules = read_modules(options.root)
    offenders = find_offenders(modules)
    if options.list:
        print("\n".join(json.dumps(asdict(offender)) for offender in offenders))
        return 0
    counts = count(options.root, modules, offenders)
    for name, value in counts.items():
        print(f"{value:>10} {name}" + (f" (at most {LIMITS[name]})" if name in LIMITS else ""))
    failed = options.check and any(counts[name] > limit for name, limit in LIMITS.items())
    for offender in offenders if failed else ():
        place = options.root / offender.file
        print(f"{place}:{offender.line}: {offender.kind} {offender.name}", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
