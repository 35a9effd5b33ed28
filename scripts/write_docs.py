"""Writes docs/configuration.md from the configuration's own documentation; a test compares the two."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from swax_megatron.config import describe

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
TEXT = """\
# Configuration

A run is one YAML file of sections and fields. Every field can be overridden on the command line by its dotted name:

    python -m launcher.run configs/demo.yaml train.steps=50 window.windows=[16,64] data.train.0.path=data/code/train

Values are YAML: `null` for nothing, `[a, b]` for a list. A name that does not exist is refused with the nearest right
one, and everything that cannot run is refused before any process starts, with the field, its value and the fix. The
resolved configuration, derived fields filled in, is written to `config.yaml` in the run directory and into every
checkpoint; a resume compares with the checkpoint's.

Steps count optimizer updates from 0. A window w lets a query see itself and the w-1 keys before it, inside its document.

Fields, as `--help` prints them (`section.field=default (choices)  meaning`):

```
{fields}
```

This page is written by `python scripts/write_docs.py`.
"""
EPILOG = """\
example:
  python scripts/write_docs.py
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    PAGE.write_text(TEXT.format(fields=describe()), encoding="utf-8")
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
