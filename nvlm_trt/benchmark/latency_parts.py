"""Splits the latency of a mean request into parts, which add up to the mean end-to-end latency of its load."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from nvlm_trt.benchmark.record import Record
from nvlm_trt.benchmark.triton_metrics import CounterSnapshot

TITLES = {
    "waiting_s": "waiting",
    "tiling_s": "tiling",
    "vision_encoder_s": "vision encoder",
    "encoding_other_s": "other encoding",
    "prefill_s": "prefill",
    "decoding_s": "decoding",
    "outside_s": "outside",
}


@dataclass(frozen=True)
class LatencyParts:
    """Holds means in seconds over the measured requests that are ok.

    The server reports the times of each request (`usage`), counted from its submission to the batcher. From these:

        waiting         queue_s - encode_s     waits for a slot
        encoding        encode_s               three parts, below
        prefill         ttft_s - queue_s       the prompt and the first token
        decoding        total_s - ttft_s       the other tokens
        outside         end to end - total_s   gRPC, Triton's queue, the network, the client

    With E = encoded images / requests, and Triton's mean time of a request to a model, queue included:

        tiling          E * mean of `tiling`
        vision_encoder  E * mean of `vision_encoder`
        encoding_other  the rest: decoding images and waiting for a decoder, cross-attention keys and values, passing
                        tensors, waiting for another request's encoding of the same image; all of the encoding if
                        Triton's metrics are not known

    Triton's means cover the whole load, warm-up included. If their sum exceeds the encoding, both are scaled down.
    """

    waiting_s: float
    tiling_s: float
    vision_encoder_s: float
    encoding_other_s: float
    prefill_s: float
    decoding_s: float
    outside_s: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)

    @classmethod
    def of(cls, records: Sequence[Record], server: CounterSnapshot | None) -> LatencyParts | None:
        """Computes the parts of a load. Returns None if no request was answered."""
        done = [
            (record.ended - record.sent, record.usage, record.usage.ttft_s, record.images)
            for record in records
            if record.status == "ok" and not record.warmup and record.usage and record.usage.ttft_s is not None
        ]
        if not done:
            return None
        n = len(done)
        encoding = math.fsum(usage.encode_s for _, usage, _, _ in done) / n
        encoded_images = sum(images - usage.cached_images for _, usage, _, images in done) / n
        tiling, vision = _split(encoding, encoded_images, server)
        return cls(
            waiting_s=math.fsum(usage.queue_s - usage.encode_s for _, usage, _, _ in done) / n,
            tiling_s=tiling,
            vision_encoder_s=vision,
            encoding_other_s=max(encoding - tiling - vision, 0.0),
            prefill_s=math.fsum(first - usage.queue_s for _, usage, first, _ in done) / n,
            decoding_s=math.fsum(usage.total_s - first for _, usage, first, _ in done) / n,
            outside_s=math.fsum(end_to_end - usage.total_s for end_to_end, usage, _, _ in done) / n,
        )


def _split(encoding: float, encoded_images: float, server: CounterSnapshot | None) -> tuple[float, float]:
    """Returns the seconds per request in tiling and in the vision encoder."""
    if server is None:
        return 0.0, 0.0
    tiling, vision = (
        encoded_images * server.models[name].mean_s if name in server.models else 0.0
        for name in ("tiling", "vision_encoder")
    )
    scale = min(1.0, encoding / (tiling + vision)) if tiling + vision else 0.0
    return tiling * scale, vision * scale
