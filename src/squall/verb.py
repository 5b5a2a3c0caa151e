"""Makes a room callable that is named like its verb: `squall.simulate(...)` works beside `squall.simulate.kernel`."""

import sys
from types import ModuleType
from typing import Any


class _CallableRoom(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)


def callable_room(name: str) -> None:
    """Let the module `name` be called: the call goes to the function in it that has the module's own name."""
    sys.modules[name].__class__ = _CallableRoom
