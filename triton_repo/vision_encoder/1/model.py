"""Triton's model `vision_encoder`: tiles -> image embeddings.

The logic is nvlm_trt.serving.triton.models.vision_encoder.
"""

import triton_python_backend_utils as pb_utils

from nvlm_trt.serving.triton.models.vision_encoder import VisionEncoderModel


class TritonPythonModel(VisionEncoderModel):
    """The class that Triton looks for. Only Triton's python stub can import `pb_utils`, so it is an argument."""

    def __init__(self) -> None:
        super().__init__(pb_utils)
