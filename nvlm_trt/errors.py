"""Defines errors that a user can act on: one line says what is wrong, where, and what to do. The CLI exits with 2."""


class NvlmError(Exception):
    """Base of all errors that user input or the environment can cause."""


class ConfigError(NvlmError):
    """A value of config.json is malformed, or the graphs do not implement it."""


class CheckpointError(NvlmError):
    """A checkpoint's files are missing, corrupt, or do not match its config."""


class EngineError(NvlmError):
    """An engine directory cannot be built, published or loaded."""


class DeviceMemoryError(EngineError):
    """The device has too little memory for an engine whose files are in order."""


class NotFiniteError(EngineError):
    """A model computes NaN or infinity."""


class ImageError(NvlmError):
    """The bytes of an image cannot be decoded, or the image exceeds a limit."""


class RequestError(NvlmError):
    """A request is invalid (prompt, sampling parameter) or exceeds a limit; other requests are not affected."""


class ParameterError(RequestError):
    """A sampling parameter or an option of a request has a wrong name or value."""


class TooLargeError(RequestError):
    """A request has more tokens or images than the engine or the server holds."""


class QueueFullError(NvlmError):
    """The bounded request queue is full; try again later."""


class ServerError(NvlmError):
    """tritonserver cannot be found, started or reached."""
