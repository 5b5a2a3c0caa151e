"""An SLO is read strictly: a limit that is misread would silently pass or fail a whole run."""

import pytest

from squall.errors import InputError
from squall.run import parse_slo


def test_limits_are_seconds() -> None:
    slo = parse_slo("ttft=1s, TPOT=100ms,e2e=0.5m")
    assert slo.limits == {"ttft": 1.0, "tpot": 0.1, "e2e": 30.0}
    assert str(slo) == "TTFT ≤ 1 s, TPOT ≤ 100 ms, E2E ≤ 30 s"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("ttft=1", "lacks a unit; write 1s or 1ms"),
        ("ttft=1000", "lacks a unit"),
        ("itl=1s", "known are ttft, tpot, e2e"),
        ("ttft", "is not a limit"),
        ("", "is not a limit"),
        ("ttft=1s,", "is not a limit"),
        ("ttft=fast", "is not a duration"),
        ("ttft=-1s", "is not a duration"),
        ("ttft=0s", "cannot be met"),
        ("ttft=1s,ttft=2s", "given twice"),
    ],
)
def test_what_is_no_slo(text: str, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        parse_slo(text)
