"""Makes the executor's request of a request whose prompt and images are there."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np

from nvlm_trt.api import SamplingParams
from nvlm_trt.backends.base import ImageFeatures, IntArray
from nvlm_trt.backends.tensorrt_llm.contract import Bindings, PromptTuningConfig, Request
from nvlm_trt.backends.tensorrt_llm.image_features import ExecutorFeatures
from nvlm_trt.backends.tensorrt_llm.masks import cross_attention_mask
from nvlm_trt.backends.tensorrt_llm.record import TrtLlmRecord
from nvlm_trt.backends.tensorrt_llm.sampling_config import sampling_config
from nvlm_trt.backends.tensorrt_llm.torch_device import wait_for
from nvlm_trt.errors import TooLargeError
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.prompt.encoder import EncodedPrompt

if TYPE_CHECKING:
    import torch

_NO_END_ID = -1


class RequestMaker:
    """Makes the requests of one engine."""

    def __init__(
        self,
        bindings: Bindings,
        config: NvlmConfig,
        record: TrtLlmRecord,
        stop_ids: Collection[int],
        dtype: torch.dtype,
        device: str,
    ) -> None:
        """`stop_ids` end an answer; `dtype` is the engine's, in which tables and features are."""
        assert config.image_token_id is not None, "read_config takes image_token_id from the tokenizer"
        self._bindings, self._config, self._record = bindings, config, record
        self._placeholder_id = config.image_token_id
        self._stop_ids = sorted(stop_ids)
        self._dtype, self._device = dtype, device

    def make(
        self, prompt: EncodedPrompt, images: Sequence[ImageFeatures], sampling: SamplingParams, max_tokens: int
    ) -> Request:
        """Make a request that streams. Raises TooLargeError for more image tokens than the engine was built for."""
        mine = cast(Sequence[ExecutorFeatures], images)
        is_crossed = bool(self._config.cross_layers)
        features = self._cross_features(mine) if is_crossed else None  # [C, hidden]
        made = self._bindings.request(
            self._token_ids(prompt.input_ids),
            max_tokens,
            streaming=True,
            sampling_config=sampling_config(self._bindings, sampling, self._config.llm.vocab_size),
            output_config=self._bindings.output_config(
                return_generation_logits=bool(sampling.logprobs), exclude_input_from_output=True
            ),
            # Stop ids are stop words: the executor's own end id could be only one, and it leaves it out of the answer.
            end_id=_NO_END_ID,
            pad_id=self._stop_ids[0] if self._stop_ids else None,
            stop_words=None if sampling.ignore_eos else [[token_id] for token_id in self._stop_ids],
            # In an answer, the placeholder would stand for an image that is not there.
            bad_words=[[self._placeholder_id]],
            prompt_tuning_config=self._prompt_table(prompt.input_ids, mine),
            encoder_input_features=features,
            encoder_output_length=None if features is None else len(features),
            cross_attention_mask=None if features is None else self._mask(prompt, len(features)),
            skip_cross_attn_blocks=self._skip(prompt) if is_crossed else None,
        )
        wait_for(self._device)  # table, features and mask are read by the executor's stream
        return made

    def _token_ids(self, input_ids: IntArray) -> list[int]:
        """Give image placeholder k of the prompt the id vocab_size + k, row k of the prompt table."""
        token_ids = input_ids.copy()  # [S]
        places = np.flatnonzero(token_ids == self._placeholder_id)
        token_ids[places] = self._config.llm.vocab_size + np.arange(len(places))
        return cast(list[int], token_ids.tolist())

    def _prompt_table(self, input_ids: IntArray, images: Sequence[ExecutorFeatures]) -> PromptTuningConfig | None:
        """Join the embeddings of all images to a table [P, hidden]; None without image embeddings."""
        rows = [cast("torch.Tensor", image.embeddings) for image in images if len(image.embeddings)]
        size = sum(map(len, rows))
        if not rows:
            return None
        if size > self._record.max_prompt_table:
            raise TooLargeError(
                f"the images have {size} image embeddings, the engine takes {self._record.max_prompt_table} per "
                "request; send fewer images, lower max_tiles, or rebuild with a larger --max-seq-len"
            )
        if self._config.cross_layers:  # reuses no KV
            return self._bindings.prompt_tuning_config(_joined(rows))
        extra_ids = np.zeros(len(input_ids), np.uint64)  # [S]
        digests = [np.full(len(image.embeddings), image.digest, np.uint64) for image in images]
        extra_ids[input_ids == self._placeholder_id] = np.concatenate(digests)
        return self._bindings.prompt_tuning_config(_joined(rows), extra_ids.tolist())

    def _cross_features(self, images: Sequence[ExecutorFeatures]) -> torch.Tensor:
        """Join the cross-attended tokens of all images: [C, hidden]. A request without any has one row of zeros, which
        nothing reads: a batch takes features and masks from every request or from none."""
        import torch

        rows = [cast("torch.Tensor", image.cross_features) for image in images if image.cross_features is not None]
        size = sum(map(len, rows))
        if size > self._record.max_encoder_len:
            raise TooLargeError(
                f"the images have {size} cross-attended tokens, the engine takes {self._record.max_encoder_len}; send "
                "fewer images, lower max_tiles, or rebuild with --max-image-tokens"
            )
        return (
            _joined(rows)
            if rows
            else torch.zeros(1, self._config.llm.hidden_size, dtype=self._dtype, device=self._device)
        )

    def _mask(self, prompt: EncodedPrompt, columns: int) -> torch.Tensor:
        """Return the mask [S, columns]. Generated tokens attend as the last token of the prompt does."""
        assert tuple(prompt.cross_ranges[-1]) == prompt.decode_range, "the prompt ends after its images"
        return cross_attention_mask(prompt.cross_ranges, columns, self._device)

    def _skip(self, prompt: EncodedPrompt) -> torch.Tensor:
        """Say [1] whether the batch may skip the gated blocks for this request: it has nothing to attend to."""
        import torch

        return torch.tensor([prompt.cross_tokens == 0])


def _joined(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    import torch

    return rows[0] if len(rows) == 1 else torch.cat(list(rows))
