"""What a user can choose about scheduling, the KV cache and the cluster, and how the kernel is told.

The defaults are vLLM v1; `Choices.unlike_vllm` names what is not. A queue order by a key is computed here, once per
request; prefix caching needs to know which tokens are the same, from the trace's hashes or from its sessions.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import polars as pl

from squall.errors import InputError
from squall.guest import Function
from squall.seeds import stream
from squall.simulate import records
from squall.simulate.blocks import BLOCK, PAGE, PIECE, POOL, Pool
from squall.simulate.records import TICKS
from squall.simulate.waiting import KEYED, VTC, Queue
from squall.trace.table import SCHEMA as TRACE_SCHEMA
from squall.units import seconds

SCHEDULERS = ("fcfs", "priority", "sjf", "srf", "lrf", "vtc", "edf")
AGING = ("priority", "sjf", "srf", "lrf")
STEP_ORDERS = {"mixed": records.MIXED, "prefill-first": records.PREFILL_FIRST, "decode-first": records.DECODE_FIRST}
PREEMPTIONS = ("recompute", "swap")
EVICTIONS = ("lru", "fifo")
ROUTERS = {
    "round-robin": records.ROUND_ROBIN,
    "random": records.RANDOM,
    "least-outstanding": records.LEAST_OUTSTANDING,
    "least-kv": records.LEAST_KV,
    "power-of-two": records.POWER_OF_TWO,
    "prefix-affinity": records.PREFIX_AFFINITY,
    "session-affinity": records.SESSION_AFFINITY,
}
AUTOSCALERS = {"queue": records.BY_QUEUE, "kv": records.BY_KV, "rate": records.BY_RATE}
ROLES = {"backlog": records.BY_BACKLOG, "forecast": records.BY_FORECAST}
CLIENTS = ("session", "service", "model")
OWN_LIMIT = 10.0
"""Seconds for the keys that a user's own policy gives all requests, and a little more for many."""
POLICY_INPUTS = ("arrival", "request_tokens", "predicted_tokens", "session", "turn", "priority")
"""What a user's own policy can ask for, by the names of its parameters."""
VTC_WEIGHTS = (1.0, 2.0)
"""Of a prompt token and of a response token (arXiv 2401.00588)."""
SCALE_EVERY = 15.0
"""Seconds between two looks of the autoscaler."""
SAME_CONVERSATION = 0.9
"""A turn continues the one before if its prompt holds that one's and at least this share of its response."""


class Choices(msgspec.Struct, frozen=True, kw_only=True):
    """All that can be chosen beyond the engine's limits; times are texts or seconds."""

    scheduler: str = "fcfs"
    prediction_error: float | None = None
    aging: float | None = None
    priorities: str | None = None
    deadlines: str | None = None
    clients: str | None = None
    step_order: str = "mixed"
    chunk_size: int | None = None
    preemption: str = "recompute"
    swap_space: float | None = None
    swap_bandwidth: float | None = None
    watermark: float | None = None
    prefix_caching: bool = False
    own_blocks: bool = False
    eviction: str | None = None
    shared_prefix: int | None = None
    host_cache: float | None = None
    host_bandwidth: float | None = None
    router: str = "round-robin"
    scrape_interval: str | float | None = None
    fail: str | None = None
    mtbf: str | float | None = None
    restart_time: str | float | None = None
    autoscale: str | None = None
    max_replicas: int | None = None
    provisioning: str | float | None = None
    scale_down_after: str | float | None = None
    prefill_replicas: int | None = None
    decode_replicas: int | None = None
    roles: str = "fixed"
    role_interval: str | float | None = None
    role_change_time: str | float | None = None
    kv_bandwidth: float | None = None
    kv_latency: str | float | None = None
    api_request_time: str | float | None = None
    api_result_time: str | float | None = None
    price: float | None = None

    @property
    def unlike_vllm(self) -> list[str]:
        """What of it the engine of vLLM v1 does not have, each as `name=value`."""
        said = []
        if self.scheduler not in ("fcfs", "priority"):
            said.append(f"scheduler={self.scheduler}")
        if self.step_order != "mixed":
            said.append(f"step-order={self.step_order}")
        if self.preemption != "recompute":
            said.append(f"preemption={self.preemption}")
        if self.eviction == "fifo":
            said.append("eviction=fifo")
        if self.roles != "fixed":
            said.append(f"roles={self.roles}")
        return said

    @property
    def disaggregated(self) -> bool:
        """Whether prefill and decode have replicas of their own."""
        return self.prefill_replicas is not None

    def time(self, name: str, default: float) -> float:
        """The field called `name` in seconds."""
        value = getattr(self, name)
        return default if value is None else seconds(value, "--" + name.replace("_", "-"))

    def autoscaling(self) -> tuple[str, float] | None:
        """The metric and its target."""
        if self.autoscale is None:
            return None
        metric, _, target = self.autoscale.partition(":")
        try:
            value = float(target)
        except ValueError:
            value = 0.0
        if metric not in AUTOSCALERS or not 0 < value < np.inf:
            raise InputError(
                f"--autoscale {self.autoscale}: it is METRIC:TARGET with the metric {', '.join(AUTOSCALERS)}, per"
                " replica, and a target above 0, such as queue:8, kv:0.7 or rate:5."
            )
        return metric, value

    def check(self, replicas: int) -> None:
        """Raise InputError for a value that cannot be, or that would change nothing."""
        self._check_names()
        self.autoscaling()
        self._check_company(replicas)
        self._check_ranges()
        self.outages(replicas, 0.0, 0)

    def _check_names(self) -> None:
        known = {"scheduler": SCHEDULERS, "step_order": STEP_ORDERS, "preemption": PREEMPTIONS, "router": ROUTERS}
        known |= {"eviction": EVICTIONS, "clients": CLIENTS, "roles": ("fixed", *ROLES)}
        for name, names in known.items():
            value = getattr(self, name)
            if name == "scheduler" and ":" in value:
                continue
            if value is not None and value not in names:
                more = ", or your own as FILE.py:FUNCTION" if name == "scheduler" else ""
                raise InputError(
                    f"--{name.replace('_', '-')} {value}: there is no such one; there are {', '.join(names)}{more}."
                )

    def _check_company(self, replicas: int) -> None:
        """Every option that needs another one."""
        own = ":" in self.scheduler
        asks = OwnPolicy(self.scheduler).asks if own else ()
        needs = {
            "prediction_error": (self.scheduler == "sjf" or "predicted_tokens" in asks, "--scheduler sjf"),
            "aging": (self.scheduler in AGING, f"--scheduler {', '.join(AGING[:-1])} or {AGING[-1]}"),
            "priorities": (self.scheduler == "priority" or "priority" in asks, "--scheduler priority"),
            "deadlines": (self.scheduler == "edf", "--scheduler edf"),
            "clients": (self.scheduler == "vtc", "--scheduler vtc"),
            "swap_space": (self.preemption == "swap", "--preemption swap"),
            "swap_bandwidth": (self.preemption == "swap", "--preemption swap"),
            "eviction": (self.prefix_caching, "--prefix-caching"),
            "shared_prefix": (self.prefix_caching, "--prefix-caching"),
            "host_cache": (self.prefix_caching, "--prefix-caching"),
            "host_bandwidth": (self.host_cache is not None, "--host-cache"),
            "scrape_interval": (
                self.router in ("least-outstanding", "least-kv", "power-of-two", "prefix-affinity"),
                "a --router that looks at the replicas",
            ),
            "restart_time": (self.fail is not None or self.mtbf is not None, "--fail or --mtbf"),
            "max_replicas": (self.autoscale is not None, "--autoscale"),
            "provisioning": (self.autoscale is not None, "--autoscale"),
            "scale_down_after": (self.autoscale is not None, "--autoscale"),
            "decode_replicas": (self.prefill_replicas is not None, "--prefill-replicas"),
            "prefill_replicas": (self.decode_replicas is not None, "--decode-replicas"),
            "role_interval": (self.roles != "fixed", "--roles backlog or --roles forecast"),
            "role_change_time": (self.roles != "fixed", "--roles backlog or --roles forecast"),
            "kv_bandwidth": (self.disaggregated, "--prefill-replicas and --decode-replicas"),
            "kv_latency": (self.disaggregated, "--prefill-replicas and --decode-replicas"),
        }
        for name, (there, what) in needs.items():
            if getattr(self, name) is not None and not there:
                raise InputError(f"--{name.replace('_', '-')} changes nothing without {what}.")
        if self.mtbf is not None and self.fail is not None:
            raise InputError("--mtbf draws the failures that --fail lists; give one of them.")
        missing = {"priority": "priorities", "edf": "deadlines"}.get(self.scheduler)
        if missing and getattr(self, missing) is None:
            raise InputError(
                f"--scheduler {self.scheduler} needs --{missing}, such as conversation="
                f"{'0,api=1' if missing == 'priorities' else '1s,api=30s'}."
            )
        if "priority" in asks and self.priorities is None:
            raise InputError(f"--scheduler {self.scheduler} asks for priority: give --priorities, such as api=1.")
        if self.autoscale is not None and self.max_replicas is None:
            raise InputError("--autoscale needs --max-replicas, the most that it may start.")
        entries = self.prefill_replicas if self.disaggregated and self.roles == "fixed" else replicas
        if self.router != "round-robin" and entries == 1 and self.max_replicas is None:
            more = "--prefill-replicas" if self.disaggregated else "--replicas"
            raise InputError(f"--router {self.router} changes nothing with one replica to choose; give more {more}.")
        if self.router == "prefix-affinity" and not self.prefix_caching:
            raise InputError("--router prefix-affinity needs --prefix-caching: without it no replica has a prefix.")
        if self.own_blocks and self.prefix_caching:
            raise InputError("--own-blocks changes nothing beside --prefix-caching, which includes it; leave it out.")
        if self.autoscale is not None and self.disaggregated:
            raise InputError(
                "--autoscale cannot be combined with --prefill-replicas: its target is of one kind of replica; let the"
                " roles change instead (--roles)."
            )
        if self.roles != "fixed" and not self.disaggregated:
            raise InputError(f"--roles {self.roles} changes nothing without --prefill-replicas and --decode-replicas.")
        if self.roles != "fixed" and replicas < 3:
            raise InputError(f"--roles {self.roles} changes nothing with one replica for each; give at least three.")
        if self.preemption == "swap" and self.swap_space is None:
            raise InputError("--preemption swap needs --swap-space, the GiB of host memory per GPU.")

    def _check_ranges(self) -> None:
        """Numbers."""
        for name in ("chunk_size", "shared_prefix", "max_replicas", "prefill_replicas", "decode_replicas"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= 10**6:
                raise InputError(f"--{name.replace('_', '-')} {value}: it must be 1 to 1e6.")
        for name in ("aging", "swap_space", "swap_bandwidth", "host_cache", "host_bandwidth", "kv_bandwidth", "price"):
            value = getattr(self, name)
            if value is not None and not 1e-6 <= value <= 1e9:
                raise InputError(f"--{name.replace('_', '-')} {value}: it must be above 0.")
        if self.watermark is not None and not 0 <= self.watermark < 1:
            raise InputError(f"--watermark {self.watermark}: it is a share of the blocks, 0 to below 1.")
        if self.prediction_error is not None and not 0 <= self.prediction_error <= 10:
            raise InputError(
                f"--prediction-error {self.prediction_error}: it is a standard deviation of the log, 0 to 10."
            )
        times = ("scrape_interval", "mtbf", "restart_time", "provisioning", "scale_down_after", "kv_latency")
        for name in (*times, "role_interval", "role_change_time", "api_request_time", "api_result_time"):
            value = self.time(name, 1.0)
            if not (1e-6 if name in ("scrape_interval", "mtbf", "role_interval") else 0) <= value <= 1e7:
                raise InputError(
                    f"--{name.replace('_', '-')} {getattr(self, name)}: it must be above 0 and at most 1e7 s."
                )

    def outages(self, replicas: int, horizon: float, seed: int) -> np.ndarray:
        """(k, 3) ticks, replica, ticks down: those of --fail, or drawn with --mtbf until `horizon` (s)."""
        down = round(self.time("restart_time", 60.0) * TICKS)
        rows: list[tuple[int, int, int]] = []
        for text in self.fail.split(",") if self.fail else ():
            number, _, when = text.strip().partition("@")
            if not number.isdecimal() or not when or int(number) >= replicas:
                raise InputError(
                    f"--fail {text.strip()}: it is REPLICA@TIME, such as 0@90s, with replicas counted from 0 to"
                    f" {replicas - 1}."
                )
            rows.append((round(seconds(when, "--fail") * TICKS), int(number), down))
        if self.mtbf is not None:
            mean = self.time("mtbf", 1.0)
            for r in range(replicas):
                random, at = stream(seed, "failures", r), 0.0
                while True:
                    at += random.exponential(mean)
                    if at > horizon or len(rows) > 10**6:
                        break
                    rows.append((round(at * TICKS), r, down))
                    at += down / TICKS
        return np.array(sorted(rows), np.int64).reshape(-1, 3)


class OwnPolicy:
    """The function that FILE.py:FUNCTION names, which runs in a process of its own (guest.py). Raises InputError."""

    def __init__(self, where: str) -> None:
        file, _, name = where.rpartition(":")
        if not file or not name:
            raise InputError(f"--scheduler {where}: give FILE.py:FUNCTION.")
        self._where = where
        with self._named():
            self._function = Function(file, name)
        self.asks = self._function.parameters
        """What it wants to know, of POLICY_INPUTS."""
        for asked in self.asks:
            if asked not in POLICY_INPUTS:
                raise InputError(
                    f"--scheduler {where}: there is no {asked!r}; a policy can ask for {', '.join(POLICY_INPUTS)}."
                )
        if not self.asks:
            raise InputError(f"--scheduler {where}: it has no parameters; it can ask for {', '.join(POLICY_INPUTS)}.")

    @property
    def took(self) -> float:
        """Seconds of CPU for the last keys."""
        return self._function.took

    def keys(self, columns: Sequence[np.ndarray] | np.ndarray, limit: float) -> np.ndarray:
        """(n,) finite keys of requests, from what it asks for, (n,) each in that order.

        Raises NoReturnError if it takes longer than `limit` seconds, RaisedError, InputError if it cannot be compiled.
        """
        with self._named():
            return self._function(np.array(columns, float), limit)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except InputError as error:
            raise type(error)(f"--scheduler {self._where}: {error}.") from None


def queue_for(choices: Choices, asked: pl.DataFrame, output: np.ndarray, replicas: int, seed: int) -> Queue | None:
    """The kernel's queue for requests in the order of `asked` (columns of a trace); None for FCFS.

    Raises InputError for an order that the trace does not allow.
    """
    name = choices.scheduler
    if name == "fcfs":
        return None
    n = len(asked)
    prompt = asked["request_tokens"].to_numpy().astype(float)
    if name == "vtc":
        return _fair_queue(choices, asked, replicas)
    if name == "priority":
        key = _by_class(asked, choices.priorities or "", "--priorities", float)
    elif name == "edf":
        limits = _by_class(asked, choices.deadlines or "", "--deadlines", lambda text: seconds(text, "--deadlines"))
        key = asked["arrival"].to_numpy() + limits
    elif name == "sjf":
        key = _predicted(choices, output, seed)
    elif name in ("srf", "lrf"):
        key = prompt if name == "srf" else -prompt
    else:
        key = _own_policy(choices, asked, output, seed)
    if n > 1 and (np.diff(key) >= 0).all():
        raise InputError(f"--scheduler {name} changes nothing here: its order is that of the arrivals, as with fcfs.")
    if choices.aging is not None:
        # key - aging * (now - arrival): what is the same for all at any time can be left out, so the order is fixed.
        key = key + choices.aging * asked["arrival"].to_numpy()
    return queue_of(KEYED, replicas, key=np.ascontiguousarray(key, float))


def queue_of(kind: int, replicas: int, *, key: np.ndarray | None = None, client: np.ndarray | None = None) -> Queue:
    """A queue with nobody in it, by the keys or the clients of the requests (waiting.py)."""
    clients = 0 if client is None else int(client.max()) + 1
    return Queue(
        kind=kind,
        key=np.empty(0) if key is None else key,
        client=np.empty(0, np.int64) if client is None else client,
        root=np.full(replicas, -1, np.int64),
        served=np.zeros((replicas, clients)),
        head=np.full((replicas, clients), -1, np.int64),
        tail=np.full((replicas, clients), -1, np.int64),
        active=np.zeros((replicas, clients), np.int64),
        prompt_weight=VTC_WEIGHTS[0],
        output_weight=VTC_WEIGHTS[1],
    )


def _fair_queue(choices: Choices, asked: pl.DataFrame, replicas: int) -> Queue:
    known = [name for name in CLIENTS if asked[name].null_count() < len(asked)]
    column = choices.clients or (known[0] if known else None)
    if column is None or column not in known:
        raise InputError(
            f"--scheduler vtc shares between clients, but the trace has no {column or 'session, service or model'}"
            " to tell them apart."
        )
    client = asked[column].cast(pl.String).rank("dense").fill_null(0).cast(pl.Int64).to_numpy()
    if client.max() > 10_000:
        raise InputError(
            f"--clients {column}: {int(client.max()):,} clients are too many; at most 10,000 can be told apart."
        )
    if client.min() == client.max():
        raise InputError(f"--scheduler vtc changes nothing here: all requests are of one {column}.")
    return queue_of(VTC, replicas, client=np.ascontiguousarray(client))


def _by_class(asked: pl.DataFrame, text: str, flag: str, read: Any) -> np.ndarray:
    """(n,) the number given for each request's service or model; what is not named comes after all that is."""
    values: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        if name in values:
            raise InputError(f"{flag} {part.strip()}: {name} has a value already.")
        try:
            values[name] = read(value)
        except ValueError:
            raise InputError(f"{flag} {part.strip()}: it is NAME=VALUE with the name of a service or model.") from None
        if not np.isfinite(values[name]):
            raise InputError(
                f"{flag} {part.strip()}: {value} cannot be compared with other numbers; give a finite one."
            )
    for name in values:
        if not ((asked["service"].cast(pl.String) == name).any() or (asked["model"] == name).any()):
            raise InputError(f"{flag} {name}: no request in the trace has this service or model.")
    by_model = asked["model"].replace_strict(values, default=None, return_dtype=pl.Float64)
    by_service = asked["service"].cast(pl.String).replace_strict(values, default=None, return_dtype=pl.Float64)
    return by_service.fill_null(by_model).fill_null(max(values.values()) + 1.0).to_numpy()


def _predicted(choices: Choices, output: np.ndarray, seed: int) -> np.ndarray:
    """(n,) predicted response tokens: the real ones times exp(N(0, error^2))."""
    error = choices.prediction_error or 0.0
    return (
        output * np.exp(stream(seed, "length predictions").normal(0.0, error, len(output))) if error else output * 1.0
    )


def _own_policy(choices: Choices, asked: pl.DataFrame, output: np.ndarray, seed: int) -> np.ndarray:
    """(n,) keys of the user's function. Raises InputError if it does not compile, raises, or returns nonsense."""
    policy, columns = OwnPolicy(choices.scheduler), []
    for name in policy.asks:
        if name == "predicted_tokens":
            columns.append(_predicted(choices, output, seed))
        elif name == "priority":
            columns.append(_by_class(asked, choices.priorities or "", "--priorities", float))
        else:
            columns.append(asked[name].cast(pl.Float64).fill_null(-1).to_numpy())
    return policy.keys(columns, OWN_LIMIT)


def affinity_of(choices: Choices, asked: pl.DataFrame) -> np.ndarray:
    """(n,) uint64 by which the session router chooses; a request without a session stands for itself."""
    if choices.router != "session-affinity":
        return np.empty(0, np.uint64)
    if asked["session"].null_count() == len(asked):
        raise InputError("--router session-affinity changes nothing here: the trace has no sessions.")
    own = pl.Series(-1 - np.arange(len(asked)))
    return _scrambled(asked["session"].fill_null(own).to_numpy(), 0)


def _scrambled(a: np.ndarray, b: np.ndarray | int) -> np.ndarray:
    """A 64-bit hash of two integers, never 0."""
    with np.errstate(over="ignore"):
        z = a.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(b) * np.uint64(0xC2B2AE3D27D4EB4F)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        return np.asarray((z ^ (z >> np.uint64(29))) | np.uint64(1))


def chains(asked: pl.DataFrame, output: np.ndarray) -> np.ndarray:
    """(n,) uint64, equal for turns of a session each of which continues the one before; without a session a request is
    like no other, and finds only its own blocks, when it was preempted."""
    turns = pl.DataFrame(
        {"row": np.arange(len(asked)), "session": asked["session"], "p": asked["request_tokens"], "o": output}
    ).filter(pl.col("session").is_not_null())
    before = pl.col("p").shift(1) + SAME_CONVERSATION * pl.col("o").shift(1)
    cut = (pl.col("p") < before).fill_null(True).cast(pl.Int64)
    turns = turns.with_columns(epoch=cut.cum_sum().over("session"))
    result = _scrambled(-1 - np.arange(len(asked)), 1)
    result[turns["row"].to_numpy()] = _scrambled(turns["session"].to_numpy(), turns["epoch"].to_numpy())
    return result


def pool_for(
    choices: Choices,
    asked: pl.DataFrame,
    output: np.ndarray,
    hash_tokens: int | None,
    *,
    replicas: np.ndarray,
    block_size: int,
    block_bytes: float,
) -> Pool | None:
    """The blocks of all replicas, if their identity matters. `block_bytes` is one block's on one GPU.

    With `own_blocks` alone no two requests share any. Raises InputError if prefix caching is asked for and the trace
    does not say which tokens are the same.
    """
    if not choices.prefix_caching and not choices.own_blocks:
        return None
    n, count, most = len(asked), len(replicas), int(replicas["blocks"].max())
    if choices.own_blocks:
        asked = asked.with_columns(pl.lit(None, TRACE_SCHEMA[name]).alias(name) for name in ("prefix", "session"))
    hashes = asked["prefix"].null_count() < n and hash_tokens is not None
    if choices.prefix_caching and not hashes and asked["session"].null_count() == n and choices.shared_prefix is None:
        raise InputError(
            "--prefix-caching: the trace has neither prefix hashes nor sessions, so what its prompts share is unknown;"
            " leave it out, or assume a common beginning with --shared-prefix N."
        )
    if hashes:
        lengths = asked["prefix"].list.len().fill_null(0).to_numpy().astype(np.int64)
        ids = asked["prefix"].drop_nulls().explode(empty_as_null=False).to_numpy().astype(np.int64)
        start = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    else:
        ids, start = np.empty(0, np.int64), np.empty(0, np.int64)
    longest = int((asked["request_tokens"].to_numpy().astype(np.int64) + output).max()) // block_size + 2
    seqs = int(replicas["max_seqs"].max())
    kept = min(most, max(4 * seqs, 1024)) if choices.disaggregated else 0
    nodes = -(-min(longest, most + 1) // PIECE) * (seqs + kept)
    host = int((choices.host_cache or 0.0) * 2**30 // block_bytes)
    return Pool(
        state=np.zeros(count, POOL),
        block=np.zeros((count, most + 1), BLOCK),
        page_group=np.empty((count, most), np.uint64),
        page_count=np.empty((count, most), np.int32),
        page_block=np.empty((count, most, PAGE), np.int32),
        page_table=np.zeros((count, 1 << (2 * most).bit_length()), np.int32),
        held=np.empty((count, nodes, PIECE), np.int32),
        before=np.empty((count, nodes), np.int32),
        host_key=np.zeros((count, host), np.uint64),
        host_before=np.zeros((count, host + 1), np.int32),
        host_after=np.zeros((count, host + 1), np.int32),
        host_table=np.zeros((count, 1 << (2 * host).bit_length()), np.int32),
        chain=chains(asked, output),
        ids=ids,
        ids_start=start,
        hash_tokens=hash_tokens or 1,
        shared=choices.shared_prefix or 0,
        fifo=int(choices.eviction == "fifo"),
        host_ticks=round(block_bytes / ((choices.host_bandwidth or 25.0) * 1e9) * TICKS) if host else 0,
        block_size=block_size,
        most_kept=kept,
    )
