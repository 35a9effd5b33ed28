"""Installation. Version ranges are pinned to what the tests ran on; ``scripts/install.sh`` installs in the right order.

DeepSpeed is a source distribution whose setup imports torch, so torch comes first and DeepSpeed is built without
isolation; a plain ``pip install .`` works in an environment that holds both already.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

TORCH = "torch>=2.11,<2.14"
DEEPSPEED = "deepspeed==0.19.8"  # exact: the ZeRO optimizer's constructor is internal to DeepSpeed
REQUIREMENTS = [
    TORCH,
    DEEPSPEED,
    'megatron-core==0.16.1; python_version < "3.12"',
    'megatron-core>=0.16.1,<0.20; python_version >= "3.12"',
    "numpy>=2,<3",
    "transformers>=5.17,<5.25",  # a minor version renames arguments: raise the bound after a run
    "tokenizers>=0.22",
    "safetensors>=0.5",
    "sentencepiece>=0.2,<0.3",
    "protobuf>=4",  # the conversion of a SentencePiece model to tokenizer.json reads its protobuf
    "webdataset>=1.0,<2",
    "pyarrow>=15",
    "zstandard>=0.22",
    "tensorboard>=2.16,<3",
    "matplotlib>=3.8,<4",  # plots of swax_megatron.report
    "pyyaml>=6",
    "pydantic>=2,<3",
    "einops>=0.8",  # megatron-core imports it and does not declare it
    "psutil>=5.9",
    "packaging>=24.2",
    "fsspec[http]>=2024.6",  # remote data sets and copies of checkpoints; object stores need their own package, e.g. the extra s3
    "setuptools",  # TensorBoard and torch's C++ extensions import it at run time
    "ninja",
    'triton>=3.4; python_version >= "3.12"',  # megatron-core 0.18 and later import it
]
TRITON = "triton>=3.6,<3.7"  # what the kernels and their interpreter tests ran with
EVALUATION = ["wonderwords==3.0.1", "matplotlib>=3.8,<4"]  # RULER's word lists, exactly the ones of its golden samples; plots
EXTRAS = {
    "test": ["accelerate>=1.1", "pytest>=8", "pytest-xdist>=3.5", "hypothesis>=6.100", "ruff>=0.9"],
    "kernels": [TRITON],
    "fast": ["gigatoken>=0.10,<0.11", "orjson>=3.10,<4"],  # several times faster than sentencepiece, the same ids; faster JSON
    "show": ["matplotlib>=3.8,<4"],
    "eval": [*EVALUATION, "lm_eval>=0.4.9,<0.5"],
    "s3": ["s3fs>=2024.6"],
}
EXTRAS["test"] += EXTRAS["fast"] + EXTRAS["eval"]


def version() -> str:
    """``__version__`` of the package, read without importing it."""
    text = (HERE / "swax_megatron" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE).group(1)


if __name__ == "__main__":
    setup(
        name="swax_megatron",
        version=version(),
        description="Distributed pretraining of SWAX: mLSTM and sliding-window attention with stochastic windows",
        long_description=(HERE / "README.md").read_text(encoding="utf-8"),
        long_description_content_type="text/markdown",
        license="Apache-2.0",
        python_requires=">=3.10,<3.13",
        packages=find_packages(include=["swax_megatron*", "launcher*", "data_prep*"]),
        install_requires=REQUIREMENTS,
        extras_require=EXTRAS,
    )
