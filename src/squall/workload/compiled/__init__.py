"""The loops that are compiled (numba), kept apart because importing numba takes longer than drawing a short trace."""
