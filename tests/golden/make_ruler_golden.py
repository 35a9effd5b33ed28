"""Write tests/golden/ruler.json with NVIDIA's own generators.

    git clone https://github.com/NVIDIA/RULER
    pip install wonderwords==3.0.1 nltk numpy scipy tqdm pyyaml    # and NLTK's punkt_tab data
    python tests/golden/make_ruler_golden.py RULER

The generators run unchanged on the made-up texts of ruler_materials.py; only their tokenizer is replaced (by words and
punctuation marks), so that the samples need no model. Kept of every sample: SHA-256 of the prompt, references, length.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import yaml

HERE = Path(__file__).parent
SAMPLES = 3
CASES = ((1024, 42), (1024, 7), (4096, 42), (16384, 42))  # context length, seed
STUB = """
import importlib.util
spec = importlib.util.spec_from_file_location("ruler_materials", {path!r})
materials = importlib.util.module_from_spec(spec); spec.loader.exec_module(materials)
class Words:
    def text_to_tokens(self, text): return materials.tokens(text)
def select_tokenizer(kind, path): return Words()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path, help="clone of NVIDIA/RULER")
    clone = parser.parse_args().clone
    revision = subprocess.run(["git", "-C", clone, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        shutil.copytree(clone / "scripts", work / "scripts")
        data = work / "scripts/data"
        _materials(data / "synthetic/json", work)
        (data / "tokenizer.py").write_text(STUB.format(path=str(HERE / "ruler_materials.py")))
        tasks = yaml.safe_load((work / "scripts/synthetic.yaml").read_text())
        constants = _load(data / "synthetic/constants.py").TASKS
        golden = {
            f"{name}/{length}/{seed}": _samples(data, work / "out", name, tasks[name], constants[tasks[name]["task"]], length, seed)
            for name in tasks
            for length, seed in CASES
        }
    source = {"repository": "https://github.com/NVIDIA/RULER", "commit": revision, "wonderwords": metadata.version("wonderwords")}
    (HERE / "ruler.json").write_text(json.dumps({"source": source, "samples": SAMPLES, "golden": golden}, indent=1) + "\n")
    print(f"{len(golden)} task, length and seed combinations written")


def _materials(folder: Path, work: Path) -> None:
    written = _load(HERE / "ruler_materials.py").write_materials(work)
    for name, target in {"essay": "PaulGrahamEssays", "squad": "squad", "hotpotqa": "hotpotqa"}.items():
        shutil.copy(written[name], folder / f"{target}.json")
    (folder / "english_words.json").write_text("{}")  # only longer lists than the golden ones draw on it


def _samples(data: Path, out: Path, name: str, task: dict, base: dict, length: int, seed: int) -> list[dict]:
    command = [sys.executable, str(data / "synthetic" / f"{task['task']}.py"), f"--save_dir={out}", f"--save_name={name}"]
    command += ["--tokenizer_path=none", "--tokenizer_type=none", f"--max_seq_length={length}", f"--num_samples={SAMPLES}"]
    command += [f"--tokens_to_generate={base['tokens_to_generate']}", f"--random_seed={seed}"]
    command += [f"--template={base['template'] + base['answer_prefix']}", *(f"--{key}={value}" for key, value in task["args"].items())]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    lines = (out / name / "validation.jsonl").read_text().splitlines()
    return [
        {
            "prompt_sha256": hashlib.sha256((entry["input"] + entry["answer_prefix"]).encode()).hexdigest(),
            "references": entry["outputs"],
            "tokens": entry["length"],
        }
        for entry in map(json.loads, lines)
    ]


def _load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
