"""Image tokens that stay on the GPU on their way from Triton's vision_encoder to the TensorRT backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from nvlm_trt.backends.base import FloatArray


class DeviceTokens:
    """A torch tensor where the runtime expects a numpy array [..., hidden]: it slices, reshapes, copies and joins image
    tokens, and only the backend reads them. Not a numpy array, but as much of one as that takes."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor
        self.flags = SimpleNamespace(writeable=True)  # of arrays that are shared the runtime sets it to False

    @classmethod
    def from_dlpack(cls, capsule: Any) -> DeviceTokens:
        """A copy on the device that the memory is on: it may belong to somebody else once this returns."""
        import torch

        tensor = torch.utils.dlpack.from_dlpack(capsule).clone()
        if tensor.is_cuda:
            torch.cuda.current_stream(tensor.device).synchronize()
        return cls(tensor)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def nbytes(self) -> int:
        return int(self.tensor.nbytes)

    def __len__(self) -> int:
        return len(self.tensor)

    def __getitem__(self, rows: slice) -> DeviceTokens:
        return DeviceTokens(self.tensor[rows])

    def reshape(self, *shape: int) -> DeviceTokens:
        return DeviceTokens(self.tensor.reshape(shape))

    def copy(self) -> DeviceTokens:
        return DeviceTokens(self.tensor.clone())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> FloatArray:
        """Copied to the host: for backends that compute there."""
        array: FloatArray = self.tensor.float().cpu().numpy()
        return array.astype(dtype or np.float32, copy=False)

    def __array_function__(
        self, function: Callable[..., Any], types: object, arguments: Sequence[Any], keywords: Mapping[str, Any]
    ) -> Any:
        """numpy asks this of np.concatenate([...]) with such tokens among its arrays (NEP 18)."""
        if function is not np.concatenate or len(arguments) != 1 or keywords:
            return NotImplemented
        import torch

        return DeviceTokens(torch.cat([self._beside(part) for part in arguments[0]]))

    def _beside(self, part: DeviceTokens | npt.NDArray[Any]) -> Any:
        """The tensor of `part`, where this one's is."""
        import torch

        tensor = part.tensor if isinstance(part, DeviceTokens) else torch.from_numpy(part)
        return tensor.to(self.tensor.device, self.tensor.dtype)
