"""The dense peak of one device, against which model FLOPs utilisation is told."""

from __future__ import annotations

import logging
import re
import time

import torch

_log = logging.getLogger(__name__)

# Dense bf16 TFLOP/s of the vendors' datasheets (no sparsity), by a piece of the device's name.
_BF16_PEAKS = {
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H800": 989.0,
    "GH200": 989.0,
    "B200": 2250.0,
    "GB200": 2250.0,
    "A100": 312.0,
    "L40S": 362.0,
}


def known_peak(name: str) -> float | None:
    """The datasheet's dense bf16 TFLOP/s of the GPU of this name; None where the table lacks it."""
    return next((peak for piece, peak in _BF16_PEAKS.items() if re.search(rf"\b{piece}\b", name)), None)


def peak_tflops(configured: float | None, precision: str, device: torch.device) -> float:
    """The configured peak; else the datasheet's for a known GPU in bf16; else a matrix product measured now."""
    if configured is not None:
        return configured
    if device.type == "cuda" and precision == "bf16":
        known = known_peak(torch.cuda.get_device_name(device))
        if known is not None:
            return known
    measured = _measured_tflops(device, torch.bfloat16 if precision == "bf16" else torch.float32)
    _log.info("peak measured by a %s matrix product: %.3g TFLOP/s (monitor.peak_tflops sets another)", precision, measured)
    return measured


def _measured_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """The best of several square products: what this process can reach here."""
    size = 4096 if device.type == "cuda" else 768
    random = torch.Generator(device).manual_seed(0)  # torch's own generator is part of a run's state
    a, b = (torch.randn(size, size, generator=random, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        started = time.perf_counter()
        product = a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    assert product.shape == (size, size)
    return 2.0 * size**3 / best / 1e12
