"""Says whether this Python can run the project: packages, their versions, DeepSpeed's C++ op. Installs nothing.

Needs nothing but the standard library itself, so that it can tell what is missing.
"""

from __future__ import annotations

import argparse
import importlib
import os
import runpy
import shutil
import subprocess
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

MODULES = {  # what is imported -> the distribution that brings it
    "torch": "torch",
    "numpy": "numpy",
    "megatron.core": "megatron-core",
    "deepspeed": "deepspeed",
    "transformers": "transformers",
    "tokenizers": "tokenizers",
    "safetensors": "safetensors",
    "sentencepiece": "sentencepiece",
    "google.protobuf": "protobuf",
    "webdataset": "webdataset",
    "pyarrow": "pyarrow",
    "zstandard": "zstandard",
    "tensorboard": "tensorboard",
    "yaml": "pyyaml",
    "pydantic": "pydantic",
    "einops": "einops",
    "psutil": "psutil",
    "matplotlib": "matplotlib",
    "fsspec": "fsspec",
    "aiohttp": "aiohttp",
}
BUILD_OP = """
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
ShareMemCommBuilder().load(verbose=False)
"""
EPILOG = """\
example:
  /path/to/python scripts/check_environment.py
"""


def missing_modules() -> list[str]:
    """Distributions whose module cannot be imported, with the reason where they are there and fail."""
    problems = []
    for module, distribution in MODULES.items():
        try:
            imported = importlib.import_module(module)
        except ModuleNotFoundError as error:
            absent = module.startswith(error.name or " ")
            problems.append(distribution if absent else f"{distribution} (which needs {error.name})")
        except ImportError as error:
            problems.append(f"{distribution} ({error})")
        else:
            if module == "torch" and not imported.cuda.is_available():
                os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed asks for it when it is imported
    return problems


def wrong_versions() -> list[str]:
    """Installed distributions outside the ranges of setup.py."""
    from packaging.requirements import Requirement

    problems = []
    for line in runpy.run_path(str(Path(__file__).resolve().parent.parent / "setup.py"))["REQUIREMENTS"]:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate():
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            continue  # told as a missing module, where it is one
        if not requirement.specifier.contains(found, prereleases=True):
            problems.append(f"{requirement.name} {found} (tested: {requirement.specifier})")
    return problems


def op_problem() -> str | None:
    """Loads DeepSpeed's shared-memory op, which compiles it where it was not built at installation."""
    lines = {"g++": "apt-get install g++", "ninja": "pip install ninja"}
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", BUILD_OP], env=environment, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    absent = [f"{name} ({how})" for name, how in lines.items() if not shutil.which(name, path=environment["PATH"])]
    why = f"it is compiled and there is no {' and no '.join(absent)}" if absent else done.stderr.strip().splitlines()[-1]
    return f"DeepSpeed's CPU communication op cannot be loaded: {why}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    warnings.simplefilter("ignore")
    if not (3, 10) <= sys.version_info[:2] <= (3, 12):
        print(f"error: Python {sys.version.split()[0]}: 3.10, 3.11 or 3.12 is needed", file=sys.stderr)
        return 2
    missing = missing_modules()
    if missing:
        print(f"error: {sys.executable} lacks {', '.join(missing)}; `make install` builds a whole environment", file=sys.stderr)
        return 2
    for problem in wrong_versions():
        print(f"warning: {problem}", file=sys.stderr)
    problem = op_problem()
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    print("environment: " + ", ".join(f"{name} {version(name)}" for name in ("torch", "megatron-core", "deepspeed", "transformers")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
