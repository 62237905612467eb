"""What is wrong with data, in a sentence."""


class DataError(ValueError):
    """The data cannot be used; the message says what is wrong, where, and what would be right."""


class SceneError(DataError):
    """One image cannot be used; the build counts it under ``reason`` and goes on."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason

    def __reduce__(self):  # travels between processes
        return SceneError, (self.reason, str(self))
