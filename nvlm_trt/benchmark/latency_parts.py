"""Where the time of a mean request went. The stages of a load add up to its mean end-to-end latency."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from nvlm_trt.benchmark.record import Record
from nvlm_trt.benchmark.triton_metrics import Snapshot

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
class Stages:
    """Means over the measured requests that are ok, seconds.

    From the server's account of each request (`usage`; all its times start with submission to the batcher):

        waiting         queue_s - encode_s     for a thread that encodes images, and for a slot
        encoding        encode_s               of which three parts, below
        prefill         ttft_s - queue_s       the prompt and the first token
        decoding        total_s - ttft_s       the other tokens
        outside         end to end - total_s   gRPC, Triton's queue, the network, the client

    With E = images that were encoded / requests, and Triton's mean time of a request to a model, queue included:

        tiling          E * mean of `tiling`
        vision_encoder  E * mean of `vision_encoder`
        encoding_other  the rest: cross-attention keys and values, passing tensors, waiting for another request's
                        encoding of the same image; all of the encoding where Triton's metrics are not known

    Triton's means are of the whole load, warm-up included; where the two exceed the encoding they are scaled down.
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
    def of(cls, records: Sequence[Record], server: Snapshot | None) -> Stages | None:
        """None if no request was answered."""
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


def _split(encoding: float, encoded_images: float, server: Snapshot | None) -> tuple[float, float]:
    """Seconds per request in tiling and in the vision encoder."""
    if server is None:
        return 0.0, 0.0
    tiling, vision = (
        encoded_images * server.models[name].mean_s if name in server.models else 0.0
        for name in ("tiling", "vision_encoder")
    )
    scale = min(1.0, encoding / (tiling + vision)) if tiling + vision else 0.0
    return tiling * scale, vision * scale
