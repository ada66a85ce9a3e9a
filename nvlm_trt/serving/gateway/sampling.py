"""Makes the sampling parameters of a request."""

from __future__ import annotations

from typing import Any

from nvlm_trt.api import SamplingParams
from nvlm_trt.bounds import MAX_SEED
from nvlm_trt.errors import ParameterError
from nvlm_trt.serving.gateway.errors import invalid
from nvlm_trt.serving.gateway.request_fields import SamplingFields
from nvlm_trt.serving.gateway.source import ServedModel

_SAME = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "ignore_eos",
    "presence_penalty",
    "frequency_penalty",
    "min_tokens",
    "n",
    "priority",
    "draft_tokens",
)


def sampling_params(
    fields: SamplingFields, model: ServedModel, max_tokens: int | None, logprobs: int
) -> SamplingParams:
    """Make the sampling parameters. Without `max_tokens`, the answer may fill the engine's sequence.

    `logprobs` alternatives are reported beside each token; 0: no log-probabilities at all. Raises HttpError."""
    values: dict[str, Any] = {name: value for name in _SAME if (value := getattr(fields, name)) is not None}
    if fields.stop is not None:
        values["stop"] = tuple(fields.stop)
    if fields.seed is not None:
        values["seed"] = fields.seed & MAX_SEED
    if fields.logit_bias:
        values["logit_bias"] = {int(token_id): float(bias) for token_id, bias in fields.logit_bias.items()}
    if fields.n is not None and fields.n > model.max_slots:
        raise invalid("invalid_value", f"n = {fields.n} is more than the {model.max_slots} slots of the engine", "n")
    try:
        return SamplingParams(max_tokens or model.max_seq_len, logprobs=logprobs, **values)
    except ParameterError as error:  # all else has been checked
        raise invalid("invalid_value", str(error), "min_tokens") from None
