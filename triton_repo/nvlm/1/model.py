"""Triton's model `nvlm`: a conversation with images -> a streamed answer.

The logic is nvlm_trt.serving.triton.models.chat.
"""

import triton_python_backend_utils as pb_utils

from nvlm_trt.serving.triton.models.chat import ChatModel


class TritonPythonModel(ChatModel):
    """The class that Triton looks for. Only Triton's python stub can import `pb_utils`, so it is an argument."""

    def __init__(self) -> None:
        super().__init__(pb_utils)
