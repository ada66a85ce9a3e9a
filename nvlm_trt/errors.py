"""Errors that a user can act on: one line saying what, where and what to do. The CLI prints them and exits with 2."""


class NvlmError(Exception):
    """Base of every error that user input or the environment can cause."""


class ConfigError(NvlmError):
    """config.json asks for something that is malformed or that the graphs do not implement."""


class CheckpointError(NvlmError):
    """A checkpoint's files are missing, corrupt, or do not match its config."""


class EngineError(NvlmError):
    """An engine directory cannot be built, published or loaded."""


class DeviceMemoryError(EngineError):
    """A device has no memory for an engine that is whole."""


class ImageError(NvlmError):
    """Encoded bytes are not an image that we accept."""


class RequestError(NvlmError):
    """A prompt, sampling parameter or limit of one request is invalid; the server goes on."""


class QueueFullError(NvlmError):
    """The bounded request queue is full; try again later."""


class ServerError(NvlmError):
    """tritonserver cannot be found, started or reached."""
