"""Sends a Trace to a live endpoint, open loop: at the times written in it, whatever the server does."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from squall.verb import callable_room

if TYPE_CHECKING:
    from squall.replay.conduct import replay
    from squall.replay.sender import Counts

__all__ = ["Counts", "replay"]

callable_room(__name__)


def __getattr__(name: str) -> Any:
    """Imported when asked for: a sending process needs the sender alone."""
    if name not in __all__:
        raise AttributeError(f"module 'squall.replay' has no attribute {name!r}")
    return getattr(import_module(f"squall.replay.{'conduct' if name == 'replay' else 'sender'}"), name)
