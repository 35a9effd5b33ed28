"""lm-eval-harness on an export, in a process of its own: ``python hf_lm_eval.py EXPORT TASK_FOLDER``, offline, printing JSON.

Every example task is evaluated one row at a time and in padded batches, and asked for its samples.
"""

from __future__ import annotations

import json
import sys


def main(export: str, tasks: str) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=tasks, include_defaults=False)
    names = ["swax_cloze", "swax_perplexity", "swax_completion"]
    answers = {}
    for batch in (1, 4):
        model = HFLM(pretrained=export, trust_remote_code=True, dtype="float32", device="cpu", batch_size=batch, max_length=64)
        found = lm_eval.simple_evaluate(
            model=model, tasks=names, task_manager=manager, log_samples=True, bootstrap_iters=0, random_seed=0, numpy_random_seed=0
        )
        answers[batch] = {
            "metrics": {name: {key: value for key, value in found["results"][name].items() if "," in key} for name in names},
            "responses": {name: [sample["resps"] for sample in found["samples"][name]] for name in names},
        }
    print(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
