"""The one exception of the library's own."""


class UnsupportedError(Exception):
    """An implementation that was asked for cannot run; the message says why and what to do."""
