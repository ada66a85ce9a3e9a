"""Maps sampling parameters to the executor's, one by one."""

from __future__ import annotations

import reprlib
import secrets

from nvlm_trt.api import SamplingParams
from nvlm_trt.backends.tensorrt_llm.contract import MAX_TOP_K, Bindings, SamplingConfig
from nvlm_trt.errors import ParameterError

# the executor counts the prompt for both penalties and holds back its one end id where ours are several; nobody has
# confirmed its form of several answers, of biases and of constraints
_NOT_PASSED_ON = ("presence_penalty", "frequency_penalty", "logit_bias", "min_tokens", "n", "constraint")


def check_sampling(sampling: SamplingParams, vocab_size: int) -> None:
    """Raise ParameterError for parameters that the executor cannot follow, or would silently change."""
    for name in _NOT_PASSED_ON:
        value = getattr(sampling, name)
        if value != SamplingParams.model_fields[name].default:
            raise ParameterError(
                f"sampling parameter {name} = {reprlib.repr(value)} is not allowed with engines of TensorRT-LLM; leave "
                "it out, or build an engine for another backend"
            )
    if not sampling.temperature:
        return
    if MAX_TOP_K < sampling.top_k < vocab_size:
        raise ParameterError(
            f"sampling parameter top_k = {sampling.top_k} is not allowed; TensorRT-LLM cuts it to {MAX_TOP_K}: ask for "
            f"at most {MAX_TOP_K}, or for 0 (off)"
        )
    if sampling.min_p and sampling.top_p < 1:
        raise ParameterError(
            f"sampling parameters top_p = {sampling.top_p} and min_p = {sampling.min_p} are not allowed together; "
            "TensorRT-LLM applies them in another order: ask for one of them"
        )


def sampling_config(bindings: Bindings, sampling: SamplingParams, vocab_size: int) -> SamplingConfig:
    """Return the executor's configuration of parameters that passed `check_sampling`.

    The executor draws with a generator of its own: a seed repeats an answer there, and gives another answer than with
    other backends. Its default is one seed for all requests, so a request without a seed gets a random one."""
    penalty = None if sampling.repetition_penalty == 1 else sampling.repetition_penalty
    if not sampling.temperature:
        return bindings.sampling_config(top_k=1, repetition_penalty=penalty)
    return bindings.sampling_config(
        top_k=sampling.top_k if sampling.top_k < vocab_size else 0,
        top_p=sampling.top_p,  # always given: without top_k and top_p the executor is greedy
        min_p=sampling.min_p or None,
        temperature=sampling.temperature,
        repetition_penalty=penalty,
        seed=secrets.randbits(64) if sampling.seed is None else sampling.seed,
    )
