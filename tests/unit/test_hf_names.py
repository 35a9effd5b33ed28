"""The map of parameter names."""

import subprocess
import sys

import pytest

from swax_megatron.hf.names import hf_names, layer_types
from swax_megatron.model.layers.full import hf_names as full
from swax_megatron.model.layers.swa import hf_names as swa
from swax_megatron.model.pattern import parse_pattern


def test_every_parameter_has_one_name():
    names = hf_names(parse_pattern("(MS)x2F"), tied=False)
    assert len(set(names.values())) == len(names) == 3 + 5 * 5 + 2 * 10 + 3 * 4
    assert names["decoder.layers.2.self_attention.fgate_proj.bias"] == "model.layers.2.mixer.fgate_proj.bias"
    assert names["decoder.layers.4.self_attention.out_proj.weight"] == "model.layers.4.mixer.out_proj.weight"
    assert names["decoder.layers.0.mlp.down_proj.weight"] == "model.layers.0.mlp.down_proj.weight"
    assert names["output_layer.weight"] == "lm_head.weight"
    assert "output_layer.weight" not in hf_names("M", tied=True)
    assert swa.HF_NAMES is full.HF_NAMES


def test_unknown_kinds_are_refused():
    for function in (lambda: hf_names("MX", tied=False), lambda: layer_types("MX")):
        with pytest.raises(ValueError, match="layer 1 has kind 'X'"):
            function()


def test_names_need_no_megatron():
    code = (
        "import sys, swax_megatron.hf.names, swax_megatron.model.layers.mlstm.hf_names;"
        "print([m for m in ('megatron', 'torch', 'transformers') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
