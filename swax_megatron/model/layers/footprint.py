"""What one mixer keeps for its backward pass, told by every layer kind in its ``cost.py``.

Two implementations differ: ``reference``, plain torch (counted on the CPU, where norms keep fp32 copies), and ``triton``, the kernels.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Footprint:
    """Bytes a token, before tensor parallelism divides them (all of them lie inside the parallel region).

    inputs: of the core, kept alone where it is recomputed (recompute=selective); core: what the core keeps otherwise, inputs included
    as far as it keeps them; states: the part of ``core`` that is mLSTM chunk states; output: the output projection's input;
    whole: fp32 copies of the mixer's input, which every tensor-parallel rank keeps whole
    """

    inputs: float
    core: float
    output: float
    states: float = 0.0
    whole: float = 0.0
