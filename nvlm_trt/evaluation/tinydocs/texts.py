"""Tasks without a picture: what a language model could do before it saw, and must still do after."""

from __future__ import annotations

import numpy as np

from nvlm_trt.evaluation.tinydocs.kinds import KEYS, Question
from nvlm_trt.evaluation.tinydocs.page import COLOURS
from nvlm_trt.evaluation.tinydocs.writing import random_code, random_value


def ask_copy(random: np.random.Generator) -> Question:
    code = random_code(random)
    return Question("copy", f"Copy {code}.", code)


def ask_reverse(random: np.random.Generator) -> Question:
    code = random_code(random, 3, 5)
    return Question("reverse", f"Reverse {code}.", code[::-1])


def ask_add(random: np.random.Generator) -> Question:
    a, b = random.integers(0, 10, 2)
    return Question("add", f"What is {a}+{b}?", str(a + b))


def ask_lookup(random: np.random.Generator) -> Question:
    """The question of a page of codes or of a form, over a page told in words."""
    count = int(random.integers(1, 4))
    if random.random() < 0.5:
        colours = [str(colour) for colour in random.permutation(list(COLOURS))[:count]]
        values = [random_code(random) for _ in colours]
        told = " ".join(f"The {colour} text says {code}." for colour, code in zip(colours, values, strict=True))
        prompts = [f"What does the {colour} text say?" for colour in colours]
    else:
        keys = [str(key) for key in random.permutation(KEYS)[:count]]
        values = [random_value(random) for _ in keys]
        told = " ".join(f"The {key} is {value}." for key, value in zip(keys, values, strict=True))
        prompts = [f"What is the {key}?" for key in keys]
    asked = int(random.integers(count))
    return Question("lookup", f"{told} {prompts[asked]}", values[asked])
