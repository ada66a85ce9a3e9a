"""Makes the tasks without an image: a language model must still do them after it has learned to see."""

from __future__ import annotations

import numpy as np

from nvlm_trt.evaluation.tinydocs.kinds import Question
from nvlm_trt.evaluation.tinydocs.writing import random_code


def ask_copy(random: np.random.Generator) -> Question:
    code = random_code(random)
    return Question("copy", f"Copy {code}.", code)


def ask_reverse(random: np.random.Generator) -> Question:
    code = random_code(random, 3, 5)
    return Question("reverse", f"Reverse {code}.", code[::-1])


def ask_add(random: np.random.Generator) -> Question:
    a, b = random.integers(0, 10, 2)
    return Question("add", f"What is {a}+{b}?", str(a + b))
