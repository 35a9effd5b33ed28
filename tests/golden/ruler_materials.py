"""Small made-up texts for RULER's essay and question tasks, and a tokenizer without a model: the golden samples' inputs."""

from __future__ import annotations

import json
import re
from pathlib import Path

_TOKEN = re.compile(r"\w+|[^\w\s]")
_NOUNS = "river stone garden letter window market winter teacher engine harbour".split()
_VERBS = "crosses follows remembers carries leaves answers watches repairs".split()


def tokens(text: str) -> list[str]:
    """Words and punctuation marks."""
    return _TOKEN.findall(text)


def write_materials(folder: Path) -> dict[str, Path]:
    """essay.json, squad.json and hotpotqa.json in the forms of the real ones; deterministic."""
    sentences = [
        f"The {_NOUNS[i % 10]} {_VERBS[i % 8]} the {_NOUNS[(i * 7 + 3) % 10]} number {i} while the {_NOUNS[(i * 3) % 10]} waits."
        for i in range(700)
    ]
    articles = [
        {
            "title": f"Article {a}",
            "paragraphs": [
                {
                    "context": f"Paragraph {p} of article {a} says that item {a}-{p} costs {a * 100 + p} coins. " + sentences[a * 7 + p],
                    "qas": [
                        {
                            "question": f"What does item {a}-{p} cost?",
                            "is_impossible": p == 2,
                            "answers": [] if p == 2 else [{"text": f"{a * 100 + p} coins"}, {"text": str(a * 100 + p)}],
                        }
                    ],
                }
                for p in range(5)
            ],
        }
        for a in range(12)
    ]
    entries = [
        {
            "question": f"Who built tower {e}?",
            "answer": f"Builder {e}",
            "context": [[f"Tower {e} part {c}", [f"Builder {e} raised part {c}. ", sentences[e * 5 + c]]] for c in range(6)],
        }
        for e in range(20)
    ]
    contents = {"essay": {"text": " ".join(sentences)}, "squad": {"version": "v2.0", "data": articles}, "hotpotqa": entries}
    paths = {}
    for name, content in contents.items():
        paths[name] = folder / f"{name}.json"
        paths[name].write_text(json.dumps(content), encoding="utf-8")
    return paths
