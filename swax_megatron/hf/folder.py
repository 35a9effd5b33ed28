"""A Hugging Face model folder: its configuration and its safetensors, read one tensor at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from swax_megatron.hf.shards import INDEX

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class ModelFolder:
    """An opened folder. ``config``: config.json; ``shapes``: tensor name -> shape. Reads the headers alone.

    Raises ValueError where the folder has no config.json or no safetensors, or its index does not match its files.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config: dict[str, Any] = self._json("config.json")
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._files: dict[str, Path] = {}
        names = self._json(INDEX).get("weight_map") if (self.path / INDEX).is_file() else None
        files = sorted(set(names.values())) if isinstance(names, dict) else ["model.safetensors"]
        for file in files:
            if not isinstance(file, str) or Path(file).name != file or not (self.path / file).is_file():
                raise ValueError(f"{self.path} lacks {file!r}: give a folder of a whole model in safetensors (no pickled .bin files)")
            self._open(self.path / file)
        missing = sorted(set(names) - set(self.shapes)) if isinstance(names, dict) else []
        if missing:
            raise ValueError(f"{self.path}: the index names {', '.join(missing[:5])}, which no file holds: the folder is incomplete")

    def read(self, name: str) -> Tensor:
        """A tensor as it is stored, on the CPU."""
        with safe_open(str(self._files[name]), framework="pt", device="cpu") as handle:
            return handle.get_tensor(name)

    def _json(self, name: str) -> dict[str, Any]:
        try:
            content = json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ValueError(f"{self.path} is no Hugging Face model: it has no {name}") from error
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.path / name} cannot be read: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{self.path / name} is no JSON object")
        return content

    def _open(self, file: Path) -> None:
        try:
            with safe_open(str(file), framework="pt", device="cpu") as handle:
                for name in handle.keys():
                    entry = handle.get_slice(name)
                    if entry.get_dtype() not in _DTYPES:
                        raise ValueError(f"{file}: {name} is {entry.get_dtype()}: only {', '.join(_DTYPES)} weights can be imported")
                    self.shapes[name], self.dtypes[name] = tuple(entry.get_shape()), _DTYPES[entry.get_dtype()]
                    self._files[name] = file
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is damaged or cannot be read ({error})") from error
