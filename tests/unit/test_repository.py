"""The laws of the house, read from the source."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("swax_megatron", "launcher", "data_prep")
SOURCES = sorted(path for top in (*PACKAGES, "scripts", "benchmarks", "tests") for path in (ROOT / top).rglob("*.py"))
# copied into the export: they stand alone
SHIPPED = ("configuration_swax.py", "modeling_swax.py", "cell_swax.py", "kernels_swax.py", "masks_swax.py")


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path, *, type_checking: bool = True) -> Iterator[str]:
    """Absolute names of everything that a file imports, anywhere in it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped: set[ast.AST] = set()
    if not type_checking:
        blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
        skipped = {inner for block in blocks for inner in ast.walk(block)}
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def ours(path: Path) -> Iterator[str]:
    return (name for name in imports(path, type_checking=False) if any(inside(name, package) for package in PACKAGES))


def library() -> list[Path]:
    return [path for path in SOURCES if path.relative_to(ROOT).parts[0] in PACKAGES]


def test_only_four_folders_import_megatron() -> None:
    allowed = tuple(f"swax_megatron/{folder}/" for folder in ("parallel", "model", "optim", "checkpoint"))
    wrong = [relative(path) for path in library() if any(inside(name, "megatron") for name in imports(path))]
    assert [path for path in wrong if not path.startswith(allowed)] == []


def test_only_one_file_imports_deepspeed() -> None:
    wrong = [relative(path) for path in library() if any(inside(name, "deepspeed") for name in imports(path))]
    assert wrong == ["swax_megatron/optim/zero.py"]


@pytest.mark.parametrize("package", ["kernels", "data"])
def test_leaves_import_nothing_of_ours(package: str) -> None:
    allowed = (f"swax_megatron.{package}", "swax_megatron.randomness")
    for path in (ROOT / "swax_megatron" / package).rglob("*.py"):
        wrong = [name for name in ours(path) if not any(inside(name, each) for each in allowed) and name != "swax_megatron"]
        assert wrong == [], relative(path)


def test_nothing_below_imports_the_trainer() -> None:
    above = ("swax_megatron/train.py", "swax_megatron/build.py", "swax_megatron/callbacks/")
    for path in library():
        if not relative(path).startswith(above):
            wrong = [name for name in ours(path) if inside(name, "swax_megatron.train") or inside(name, "swax_megatron.trainer")]
            assert wrong == [], relative(path)


def test_the_exported_code_stands_alone() -> None:
    for name in SHIPPED:
        path = ROOT / "swax_megatron" / "hf" / name
        for module in imports(path):
            assert not any(inside(module, package) for package in ("megatron", "deepspeed")), f"{name} imports {module}"
            assert not inside(module, "swax_megatron") or inside(module, "swax_megatron.hf"), f"{name} imports {module}"


def test_no_script_bears_a_standard_module_s_name() -> None:
    """``python data_prep/x.py`` puts data_prep first on the path: an ``inspect.py`` there would break ``import torch``."""
    names = {path.stem for top in ("data_prep", "launcher", "scripts") for path in (ROOT / top).glob("*.py")}
    assert names & set(sys.stdlib_module_names) == set()


def test_files_are_short() -> None:
    long = {relative(path): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert {path: lines for path, lines in long.items() if lines > 500} == {}


def test_every_package_folder_has_an_init() -> None:
    """Without one a folder is left out of an installation."""
    folders = {path.parent for path in library()}
    assert [relative(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def test_no_pickle_no_unsafe_yaml_no_extraction() -> None:
    for path in library():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert not {"pickle", "cloudpickle", "dill"} & {name.split(".")[0] for name in imports(path)}, relative(path)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                owner = node.value.id if isinstance(node.value, ast.Name) else ""
                call = f"{owner}.{node.attr}"
                assert call not in ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "sys.path"), f"{relative(path)}:{node.lineno} {call}"
                assert node.attr != "extractall", f"{relative(path)}:{node.lineno} {call}"
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                safe = any(word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in node.keywords)
                assert safe, f"{relative(path)}:{node.lineno} torch.load without weights_only=True"
            assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f"{relative(path)}:{node.lineno} bare except"


def command_lines() -> list[tuple[str, ...]]:
    """How to start every file of ours that builds a command-line parser."""
    found: list[tuple[str, ...]] = []
    for path in SOURCES:
        top = path.relative_to(ROOT).parts[0]
        text = path.read_text(encoding="utf-8")
        if top == "tests" or "ArgumentParser(" not in text or 'if __name__ == "__main__"' not in text:
            continue
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found.append((relative(path),) if top in ("data_prep", "scripts") else ("-m", module.removesuffix(".__main__")))
    return found


@pytest.mark.parametrize("command", command_lines(), ids=" ".join)
def test_every_command_s_help_has_an_example(command: tuple[str, ...]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, *command, "--help"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    name = command[-1]
    after_usage = done.stdout.split("\n\n", 1)[1]
    assert any(name in line and line.startswith("  ") for line in after_usage.splitlines()), f"no example of {name} in --help"


def test_version_is_one() -> None:
    import swax_megatron

    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {swax_megatron.__version__}" in changelog
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert "version=version()" in setup


def test_links_of_the_pages_lead_somewhere() -> None:
    import re

    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
