"""The trace options: which rows of a trace, at which load. The same on every verb that reads a TRACE."""

from dataclasses import dataclass
from typing import Literal

from squall.seeds import DEFAULT_SEED
from squall.trace.table import Trace
from squall.units import Duration

ScaleMethod = Literal["compress", "thin", "superpose", "model"]
OverLimit = Literal["drop", "clip", "keep"]


@dataclass(frozen=True, kw_only=True)
class TraceOptions:
    """Filters and scaling, applied in the order of these fields."""

    format: str | None = None
    """Format of the input; detected if not given."""
    service: Literal["conversation", "api"] | None = None
    """Only this service."""
    model_name: str | None = None
    """Only requests to this recorded model (ChatGPT, GPT-4)."""
    between: str | None = None
    """Only START:END of the trace, in its own time from its start: 8h:9h, 90:, :2d."""
    head: int | None = None
    """Only the first N rows."""
    drop_failed: bool = False
    """Leave out the requests that the recorded system failed."""
    max_request_tokens: int | None = None
    """Limit of the prompt length; see --over-limit."""
    max_response_tokens: int | None = None
    """Limit of the response length; see --over-limit."""
    over_limit: OverLimit = "drop"
    """What to do with longer requests: drop, clip or keep (and count) them."""
    sample: float | None = None
    """Keep each request with this probability (0 to 1)."""
    rate: float | None = None
    """Rescale to this mean rate in requests/s by --scale-method."""
    speed: float | None = None
    """Divide all gaps by this factor."""
    scale_method: ScaleMethod = "compress"
    """How --rate is reached: compress time, thin out, superpose shifted copies, or fit a model and draw."""
    seed: int = DEFAULT_SEED
    """Seed of every random choice."""


def select(trace: Trace, options: TraceOptions) -> Trace:
    """`trace` with `options` applied in the order of the fields; each step is noted in the metadata."""
    raise NotImplementedError
