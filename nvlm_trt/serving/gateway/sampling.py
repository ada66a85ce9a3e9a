"""Makes the sampling parameters of a request."""

from __future__ import annotations

from typing import Any

from nvlm_trt.api import Constraint, SamplingParams
from nvlm_trt.bounds import MAX_SEED
from nvlm_trt.serving.gateway.errors import invalid
from nvlm_trt.serving.gateway.request_fields import JsonObjectFormat, JsonSchemaFormat, SamplingFields
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

    `logprobs` alternatives are reported beside each token; 0: no log-probabilities at all. Raises HttpError
    and ParameterError."""
    values: dict[str, Any] = {name: value for name in _SAME if (value := getattr(fields, name)) is not None}
    if fields.stop is not None:
        values["stop"] = tuple(fields.stop)
    if fields.seed is not None:
        values["seed"] = fields.seed & MAX_SEED
    if fields.logit_bias:
        values["logit_bias"] = {int(token_id): float(bias) for token_id, bias in fields.logit_bias.items()}
    if fields.n is not None and fields.n > model.max_slots:
        raise invalid("invalid_value", f"n = {fields.n} is more than the {model.max_slots} slots of the engine", "n")
    values["constraint"] = _constraint(fields)
    return SamplingParams(max_tokens or model.max_seq_len, logprobs=logprobs, **values)


def _constraint(fields: SamplingFields) -> Constraint | None:
    """Return what an answer must be. Raises HttpError if the request says so twice, and ParameterError."""
    form, outputs = fields.response_format, fields.structured_outputs
    of_format: Constraint | None = None
    if isinstance(form, JsonSchemaFormat):
        of_format = Constraint(json_schema=form.json_schema.schema_)
    elif isinstance(form, JsonObjectFormat):
        of_format = Constraint(json_object=True)
    if outputs is None:
        return of_format
    if of_format is not None:
        raise invalid(
            "invalid_value",
            "response_format and structured_outputs both say what an answer must be; send one of them",
            "structured_outputs",
        )
    return Constraint(**outputs.model_dump())
