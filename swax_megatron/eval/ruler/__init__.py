"""RULER (Hsieh et al., arXiv 2404.06654): thirteen tasks at any context length, generated here as NVIDIA's generators do.

For the same tokenizer, seed, length and texts a sample equals NVIDIA's to the character (tests/golden/ruler.json); the
task definitions in ``tasks.py`` quote the benchmark's own prompts (Apache-2.0), which is what makes scores comparable.
"""

from swax_megatron.eval.ruler.generate import Materials, Sample, generate
from swax_megatron.eval.ruler.score import score
from swax_megatron.eval.ruler.tasks import TASKS, Task

__all__ = ["TASKS", "Materials", "Sample", "Task", "generate", "score"]
