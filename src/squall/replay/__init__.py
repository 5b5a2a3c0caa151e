"""Sends a Trace to a live endpoint, open loop: at the times written in it, whatever the server does."""

from squall.replay.conduct import replay
from squall.replay.sender import Counts
from squall.verb import callable_room

__all__ = ["Counts", "replay"]

callable_room(__name__)
