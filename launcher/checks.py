"""What a node tells of itself, and which nodes are unfit to train: plain dictionaries in, sentences out."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from swax_megatron.hardware import known_peak

SECONDS = 20  # for a tool of the node
PACKAGES = ("torch", "megatron-core", "deepspeed", "triton", "numpy")
# Xid messages that mean broken hardware (NVIDIA's Xid catalogue): memory pages, bus, NVLink, falls off the bus, failed row remapping.
# 63 (a row was remapped) and 94 (a contained error) are not: the GPU mended itself.
XID_FATAL = {48, 64, 74, 79, 92, 95, 119, 120, 140}
XID_HOURS = 24.0  # the kernel's log reaches back to the boot: what is older was seen, and mended or not, by others
_QUERY = "index,clocks.sm,clocks.max.sm,ecc.errors.uncorrected.volatile.total,clocks_throttle_reasons.hw_slowdown,driver_version"


def _floor(default: float, doc: str) -> Any:
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True)
class Floors:
    """Below (for skew: above) these a node is unfit."""

    min_gpus: int = _floor(0, "GPUs a node must have; 0: as many as the node with most of them")
    min_disk: float = _floor(2.0, "free GB of every folder")
    min_memory: float = _floor(1.0, "free GB of memory")
    max_skew: float = _floor(5.0, "seconds by which a clock may differ from the first node's")
    min_matmul: float = _floor(0.0, "TFLOP/s of a matrix product on every device; 0: by --min-peak")
    min_peak: float = _floor(0.4, "share of its datasheet's peak that a matrix product must reach on a known GPU, where --min-matmul is 0")
    min_bandwidth: float = _floor(0.0, "GB/s of an all-reduce with a neighbour; 0: no floor")
    min_share: float = _floor(0.8, "share of the median of speed that a node must reach, from four nodes on")


def node_report(name: str, folders: Iterable[Path]) -> dict[str, Any]:
    """What this node tells of itself; ``faults`` are the ones that need no comparison."""
    faults: list[str] = []
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cards = _cards(faults)
    if gpus and len(cards) > gpus:
        faults.append(f"the driver shows {len(cards)} GPUs, torch can use {gpus}")
    _xid(faults)
    _site_check(faults)
    return {
        "node": name,
        "time": time.time(),
        "gpus": gpus,
        "cards": cards,
        "free_gb": {str(folder): _free_gb(folder) for folder in folders},
        "memory_gb": psutil.virtual_memory().available / 1e9,
        "versions": _versions(cards),
        "matmul_tflops": _products(gpus, faults),
        "peak_tflops": _peak() if gpus else None,
        "faults": faults,
    }


def compare(reports: dict[str, dict[str, Any]], expected: list[str], floors: Floors) -> dict[str, list[str]]:
    """Node -> what is wrong with it, over all nodes; fit nodes are left out. expected: all nodes in the order of their ranks."""
    found: dict[str, list[str]] = {node: [] for node in expected}
    for node in expected:
        if node not in reports:
            found[node].append("sent no report: it did not start, or hung while it was checked")
    known = {node: reports[node] for node in expected if node in reports}
    gpus = floors.min_gpus or max((report["gpus"] for report in known.values()), default=0)
    kinds = {key for report in known.values() for key in report["versions"]}
    versions = {key: _most(report["versions"].get(key) for report in known.values()) for key in sorted(kinds)}
    for node, report in known.items():
        say = found[node].append
        for fault in report["faults"]:
            say(fault)
        if report["gpus"] < gpus:
            say(f"{report['gpus']} GPUs, {gpus} expected")
        for folder, free in report["free_gb"].items():
            if free < floors.min_disk:
                say(f"{free:.1f} GB free in {folder}, at least {floors.min_disk:g} wanted")
        if report["memory_gb"] < floors.min_memory:
            say(f"{report['memory_gb']:.1f} GB of free memory, at least {floors.min_memory:g} wanted")
        if abs(report.get("skew") or 0.0) > floors.max_skew:
            say(f"its clock is {report['skew']:+.1f} s off the first node's")
        for key, usual in versions.items():
            if report["versions"].get(key) != usual:
                say(f"{key} {report['versions'].get(key)}, other nodes have {usual}")
    _slow(known, found, floors)
    _unreached(known, expected, found)
    return {node: faults for node, faults in found.items() if faults}


def _unreached(reports: dict[str, dict[str, Any]], expected: list[str], found: dict[str, list[str]]) -> None:
    """Whom the network fails. A node that reached nobody is not to blame where all its partners are silent or unfit themselves."""
    strangers = [node for node, report in reports.items() if report.get("reached") is False]
    if 2 * len(strangers) > len(reports):  # then the fault is the first node's, not theirs
        found[expected[0]].append("no other node could reach it")
    else:
        for node in strangers:
            found[node].append(f"cannot reach the first node ({reports[node]['problem']})")
    for node, report in reports.items():
        if len(expected) > 1 and "bandwidth" not in report:
            found[node].append("did not finish measuring with its neighbours")
    unfit = {node for node, faults in found.items() if faults}
    for node, report in reports.items():
        missed = {expected[int(rank)]: problem for rank, problem in report.get("missed", {}).items() if int(rank) < len(expected)}
        if missed and report["bandwidth"] is None and not set(missed) <= unfit:
            found[node].append("; ".join(f"no all-reduce with {partner} ({problem})" for partner, problem in missed.items()))


def _slow(reports: dict[str, dict[str, Any]], found: dict[str, list[str]], floors: Floors) -> None:
    """Speeds against the floors, and from four nodes on against the median."""
    peaks = {node: floors.min_peak * (report.get("peak_tflops") or 0.0) for node, report in reports.items()}
    kinds = (
        ("matmul_tflops", "a matrix product reaches", "TFLOP/s", {node: floors.min_matmul or peak for node, peak in peaks.items()}),
        ("bandwidth", "all-reduce with its neighbours reaches", "GB/s", dict.fromkeys(reports, floors.min_bandwidth)),
    )
    for key, words, unit, least in kinds:
        speeds = {node: min(value) if isinstance(value, list) else value for node, value in _present(reports, key).items()}
        median = statistics.median(speeds.values()) if len(speeds) >= 4 else None
        for node, speed in speeds.items():
            if speed < least[node]:
                found[node].append(f"{words} {speed:.3g} {unit}, at least {least[node]:.4g} wanted")
            elif median is not None and speed < floors.min_share * median:
                found[node].append(f"{words} {speed:.3g} {unit}, {speed / median:.0%} of the median of {len(speeds)} nodes")


def _present(reports: dict[str, dict[str, Any]], key: str) -> dict[str, Any]:
    return {node: report[key] for node, report in reports.items() if report.get(key) not in (None, [])}


def _most(values: Iterable[Any]) -> Any:
    """The most common value; of several the one that comes first."""
    counted = Counter(values).most_common(1)
    return counted[0][0] if counted else None


def _free_gb(folder: Path) -> float:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free / 1e9


def _versions(cards: list[dict[str, str]]) -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    if cards:
        found["driver"] = cards[0]["driver_version"]
    return found


def _tool(*command: str) -> str | None:
    """The output of a tool of the node; None where there is none or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except FileNotFoundError:
        return None
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"failed: {error}"
    return done.stdout if done.returncode == 0 else f"failed: {done.stdout[-200:]}{done.stderr[-200:]}".strip()


def _cards(faults: list[str]) -> list[dict[str, str]]:
    """nvidia-smi's lines, one a GPU; faults of clocks and memory are added."""
    text = _tool("nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits")
    if text is None:
        return []
    if text.startswith("failed: "):
        faults.append(f"nvidia-smi {text}")
        return []
    cards = [dict(zip(_QUERY.split(","), (value.strip() for value in line.split(",")), strict=True)) for line in text.splitlines() if line]
    for card in cards:
        errors = card["ecc.errors.uncorrected.volatile.total"]
        if errors.isdigit() and int(errors):
            faults.append(f"GPU {card['index']}: {errors} uncorrected memory errors (ECC)")
        if card["clocks_throttle_reasons.hw_slowdown"] == "Active":
            faults.append(f"GPU {card['index']}: slowed down by its hardware to {card['clocks.sm']} of {card['clocks.max.sm']} MHz")
    return cards


def _xid(faults: list[str]) -> None:
    """Recent Xid messages of the kernel's log, where it may be read."""
    text = _tool("dmesg") or ""
    found = re.findall(r"\[\s*(\d+\.\d+)\].*NVRM: Xid \([^)]*\): (\d+)", text)  # seconds since the boot, as time.monotonic on Linux
    recent = {int(number) for seconds, number in found if time.monotonic() - float(seconds) < XID_HOURS * 3600}
    for number in sorted(recent & XID_FATAL):
        faults.append(f"the kernel reported Xid {number}")


def _site_check(faults: list[str]) -> None:
    """The site's own check (SWAX_NODE_CHECK): any exit code but 0 makes the node unfit."""
    command = os.environ.get("SWAX_NODE_CHECK")
    if not command:
        return
    try:
        done = subprocess.run(shlex.split(command), capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        faults.append(f"SWAX_NODE_CHECK could not run ({error})")
        return
    if done.returncode:
        said = " ".join((done.stdout + done.stderr).split())[-200:]
        faults.append(f"SWAX_NODE_CHECK ended with {done.returncode}{f': {said}' if said else ''}")


def _peak() -> float | None:
    """The datasheet's bf16 peak of this node's first GPU, TFLOP/s; None for one that is unknown, or part of one (MIG)."""
    name = torch.cuda.get_device_name(0)
    return None if "MIG" in name else known_peak(name)


def _products(gpus: int, faults: list[str]) -> list[float]:
    """The speed of every device that can multiply matrices; a device that cannot is a fault and hides no other."""
    speeds = []
    for device in [torch.device("cuda", index) for index in range(gpus)] or [torch.device("cpu")]:
        try:
            speeds.append(_matmul(device))
        except RuntimeError as error:
            faults.append(f"{device}: a matrix product failed ({str(error).strip().splitlines()[0][:160]})")
    return speeds


def _matmul(device: torch.device) -> float:
    """TFLOP/s of the best of several square matrix products, bf16 on a GPU, fp32 on the CPU."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (768, torch.float32)
    a = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(8):
        started = time.perf_counter()
        product = a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    assert product.shape == (size, size)
    return 2.0 * size**3 / best / 1e12

