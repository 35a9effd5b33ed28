"""Peak resident memory of an export or an import, in a process of its own: ``python hf_memory.py export|import FOLDER ...``.

Prints {"before", "peak"}: resident bytes after the imports of every module and a first small use of them, and the highest
resident size (VmHWM, reset there through /proc/self/clear_refs) while the work is done.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path


def resident(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def main(what: str, small: str, large: str, out: str, *options: str) -> None:
    from swax_megatron.hf import export, import_

    def run(source: str, target: str, *more: str) -> None:
        if what == "export":
            assert export.main(["--checkpoint", source, "--out", target, "--no-verify", *more]) == 0
        else:
            assert import_.main(["--model", source, "--config", *more, f"run_dir={target}"]) == 0

    run(small, out + "-small", *options)
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    run(large, out, *options)
    print(json.dumps({"before": before, "peak": resident("VmHWM")}))


if __name__ == "__main__":
    main(*sys.argv[1:])
