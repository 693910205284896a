"""The modules that a program reaches from its first one, as sources without comments: what a bundle is made of.

Imports are followed in the syntax tree, those inside functions too, so nothing is run. The surprise is packages that
only hand on names (pgolf_kernels itself): of those the bundle holds a line for each name that somebody asks for, or
every op would be in it.
"""

import ast
import functools
from dataclasses import dataclass, field
from pathlib import Path

import pgolf_kernels

ROOTS = {"pgolf": Path(__file__).parent.parent, "pgolf_kernels": Path(pgolf_kernels.__file__).parent}


@dataclass
class Modules:
    """sources: stripped, by full name; packages: which of them are packages; left_out: what they import in vain."""

    sources: dict[str, str] = field(default_factory=dict)
    packages: set[str] = field(default_factory=set)
    left_out: set[str] = field(default_factory=set)


def gather(entries: tuple[str, ...], left_out: set[str]) -> Modules:
    """All modules of pgolf and pgolf_kernels that the entries import, directly or not.

    Args:
        entries: full names.
        left_out: full names of modules that are not followed, even where they are imported.
    """
    walk = _Walk(left_out)
    for name in entries:
        walk.need(name)
    sources = {name: _stripped(name) for name in walk.whole}
    for name, wanted in walk.wanted.items():
        sources[name] = "".join(f"{line}\n" for line in sorted(wanted))
    packages = {name for name in sources if _file(name).name == "__init__.py"}
    return Modules(dict(sorted(sources.items())), packages, walk.missed)


class _Walk:
    """Follows imports. whole: modules that are taken so; wanted: lines of packages that hand on names."""

    def __init__(self, left_out: set[str]) -> None:
        self.left_out = left_out
        self.whole: set[str] = set()
        self.wanted: dict[str, set[str]] = {}
        self.missed: set[str] = set()

    def need(self, name: str) -> None:
        """Take a module and what it imports."""
        if name in self.left_out:
            self.missed.add(name)
        if name in self.left_out or name in self.whole or name in self.wanted:
            return
        if "." in name:
            self.need(name.rpartition(".")[0])
        path, tree = _file(name), _parsed(name)
        if path.name == "__init__.py" and _hands_on(tree):
            self.wanted[name] = set()
            return
        self.whole.add(name)
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.split(".")[0] in ROOTS:
                        self.need(alias.name)
            elif isinstance(node, ast.ImportFrom):
                self._need_from(_absolute(node, package), [alias.name for alias in node.names])

    def _need_from(self, source: str, names: list[str]) -> None:
        if source.split(".")[0] not in ROOTS:
            return
        for name in names:
            if _file(f"{source}.{name}"):
                self.need(source)
                self.need(f"{source}.{name}")
            else:
                self._need_name(source, name)

    def _need_name(self, source: str, name: str) -> None:
        self.need(source)
        if source not in self.wanted:
            return
        for node in _parsed(source).body:
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if name == (alias.asname or alias.name):
                        self.wanted[source].add(ast.unparse(ast.ImportFrom(node.module, [alias], node.level)))
                        self._need_from(_absolute(node, source), [alias.name])


def _file(name: str) -> Path | None:
    """The file of a module of ours; None: there is no such module."""
    first, *rest = name.split(".")
    base = ROOTS[first].joinpath(*rest)
    return next((p for p in (base / "__init__.py", base.parent / f"{base.name}.py") if p.is_file()), None)


@functools.cache
def _parsed(name: str) -> ast.Module:
    """To be read only. Kept, as what is stripped of it: a search for a size counts the same modules again and again."""
    return ast.parse(_file(name).read_text(encoding="utf-8"), name)


@functools.cache
def _stripped(name: str) -> str:
    return strip(ast.parse(_file(name).read_text(encoding="utf-8")), name)


def _hands_on(tree: ast.Module) -> bool:
    """Whether a package's file has imports, __all__ and a docstring alone."""

    def idle(node: ast.stmt) -> bool:
        named = isinstance(node, ast.Assign) and [ast.unparse(t) for t in node.targets] == ["__all__"]
        return named or isinstance(node, ast.ImportFrom) or _is_docstring(node)

    return all(map(idle, tree.body))


def _absolute(node: ast.ImportFrom, package: str) -> str:
    parts = package.split(".")
    base = parts[: len(parts) - node.level + 1] if node.level else []
    return ".".join([*base, *([node.module] if node.module else [])])


def strip(tree: ast.Module, name: str = "") -> str:
    """A module's source without comments, docstrings and the annotations of functions, indented by one space.

    Annotations of classes stay, for dataclasses are made of them, and so do those of Triton's kernels. python-minifier,
    which also renames local variables, makes Python 5 % smaller still (69,217 for 72,772 bytes of 70 modules, wrapped),
    takes six times as long, and leaves tracebacks that nobody can read.
    """
    text = ast.unparse(ast.fix_missing_locations(_Stripper().visit(tree)))
    # Without docstrings unparse writes every string on one line, so that all leading spaces are indentation.
    assert '"""' not in text and "'''" not in text, f"{name} has a string over several lines after unparsing"
    lines = [line for line in text.splitlines() if line]
    indents = [(len(line) - len(line.lstrip(" "))) // 4 for line in lines]
    return "".join(f"{' ' * indent}{line.lstrip(' ')}\n" for indent, line in zip(indents, lines, strict=True))


class _Stripper(ast.NodeTransformer):
    """Takes out what a running program does not need."""

    def visit_Module(self, node: ast.Module) -> ast.Module:
        return self._without_docstring(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        return self._without_docstring(node, fields=True)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        if not any("jit" in ast.unparse(decorator) for decorator in node.decorator_list):
            node.returns = None
            arguments = node.args
            every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
            for argument in filter(None, every):
                argument.annotation = None
        return self._without_docstring(node)

    def _without_docstring(self, node, fields: bool = False):
        body = []
        for child in node.body:
            if isinstance(child, ast.AnnAssign) and not fields:
                if child.value is None:
                    continue
                child = ast.Assign([child.target], child.value)
            if not _is_docstring(child):
                body.append(child)
        node.body = body or ([] if isinstance(node, ast.Module) else [ast.Pass()])
        return self.generic_visit(node)


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
