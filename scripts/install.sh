#!/usr/bin/env bash
# Creates a virtual environment and installs the project into it, DeepSpeed's C++ op included.
#
#   scripts/install.sh            -> .venv
#   scripts/install.sh FOLDER     -> FOLDER
#
# The base interpreter is the first of python3.11, python3.12, python3.10, python3 that runs and is 3.10 to 3.12.
set -euo pipefail

case "${1:-}" in -h | --help)
    sed -n '2,7s/^# \{0,1\}//p' "$0"
    exit 0
    ;;
esac

cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder="${1:-.venv}"

fail() {
    echo "error: $*" >&2
    exit 2
}

find_python() {
    local name
    for name in python3.11 python3.12 python3.10 python3; do
        if "$name" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    return 1
}

base="$(find_python)" || fail "no Python 3.10, 3.11 or 3.12 found: install one, e.g. apt-get install python3 python3-venv"
if ! command -v g++ >/dev/null; then
    fail "g++ is missing, and DeepSpeed's CPU communication op is compiled at installation: apt-get install g++"
fi
"$base" -c 'import sysconfig, pathlib, sys; sys.exit(not (pathlib.Path(sysconfig.get_paths()["include"]) / "Python.h").exists())' ||
    fail "Python's C headers are missing, and DeepSpeed's op is compiled at installation: apt-get install python3-dev"

echo "== environment $folder with $("$base" --version)"
rm -f "$folder/.installed"
[ -x "$folder/bin/python" ] || "$base" -m venv "$folder" || fail "could not create $folder: apt-get install python3-venv"
python="$folder/bin/python"
pip=("$python" -m pip install -qq --disable-pip-version-check)
requirement() { "$python" -c "import setup; print(setup.$1)"; }

"${pip[@]}" --upgrade pip "setuptools>=68,<82" wheel
echo "== torch"
"${pip[@]}" "$(requirement TORCH)" "numpy>=2,<3" ninja packaging
echo "== DeepSpeed, with its C++ op"
# From source and not from pip's wheel cache: a cached wheel may hold no op, or one for another torch.
"${pip[@]}" einops hjson msgpack psutil py-cpuinfo "pydantic>=2,<3" tqdm
PATH="$(cd "$folder" && pwd)/bin:$PATH" DS_ACCELERATOR=cpu DS_BUILD_SHM_COMM=1 \
    "${pip[@]}" --no-cache-dir --no-build-isolation --no-binary deepspeed "$(requirement DEEPSPEED)"
echo "== the project and the rest"
"${pip[@]}" --no-build-isolation --editable ".[test]"
# A CPU build of torch brings no Triton; the kernels' tests run in its interpreter. A CUDA build pins its own.
"$python" -c "import triton" 2>/dev/null || "${pip[@]}" "$(requirement TRITON)"
"$python" scripts/check_environment.py
"$python" -c 'import hashlib; print(hashlib.sha256(open("setup.py", "rb").read()).hexdigest())' >"$folder/.installed"
echo "== done: $folder"
