"""An engine's steps as its clients see them: tokens that come together were made together.

A server that streams sends every running sequence one token per step. So a run with the times of all tokens tells when
each step ended, whose tokens and whose prompts it computed, and from the end of the step before, how long it took. That
is the step time itself: no queue and no scheduler lie between it and what was measured. Of a step after an idle moment
nothing is known, nor where it cannot be told what was computed (a preempted request resumes, a prompt comes in chunks).
"""

from typing import NamedTuple

import numpy as np
import polars as pl

from squall.run.table import Run
from squall.simulate.cluster import Cluster
from squall.simulate.step_time import gpu_times, step_cost

MOST_ABSENT = 3
"""So many steps in a row a running sequence may bring no text (half a character), before it counts as preempted."""

FEWEST = 200
"""Steps without which a run says too little about them."""


class Steps(NamedTuple):
    """Steps that were seen, (n,) arrays; the letters are those of step_time.py."""

    took: np.ndarray
    """Seconds."""
    tokens: np.ndarray
    """T."""
    sequences: np.ndarray
    """n."""
    kv_tokens: np.ndarray
    """D; no chunk of a prompt follows another one here, so that R is 0."""
    attention_pairs: np.ndarray
    """Q."""
    apart: np.ndarray
    """Seconds between two of its tokens when they reached the client; nan if it had one."""

    def seconds(self, cluster: Cluster) -> np.ndarray:
        """How long they take on `cluster`, (n,)."""
        cost = step_cost(cluster.step_time, cluster.model, cluster.gpu, cluster.tp)
        gpu = gpu_times(cost, self.tokens, self.sequences, self.kv_tokens, self.attention_pairs)
        prompts = self.tokens > self.sequences
        host = cost.host + cost.host_per_sequence * self.sequences + cost.host_prompts * prompts
        return np.maximum(gpu, host) + cost.gap if cluster.profile.async_scheduling else gpu + host


def steps_seen(runs: list[Run], budget: int, before: float = np.inf) -> Steps:
    """The steps that can be told from the token times of `runs`, of which each holds all that the engine served then.

    `budget` is the most tokens of a step (max_num_batched_tokens); what came after `before` seconds is not looked at.
    """
    found = [_of(run.table, budget, before) for run in runs]
    return Steps(*(np.concatenate([each[k] for each in found]) for k in range(len(Steps._fields))))


def _of(table: pl.DataFrame, budget: int, before: float) -> Steps:
    nothing = Steps(*(np.empty(0) for _ in Steps._fields))
    told = table.filter(pl.col("first_token").is_not_null() & (pl.col("first_token") < before))
    known = ("chunks", "request_tokens", "response_tokens")
    if told.is_empty() or told.select(pl.any_horizontal(pl.col(known).is_null()).any()).item():
        return nothing
    prompt, response = told["request_tokens"].to_numpy(), told["response_tokens"].to_numpy()
    computed = prompt - (told["cached_tokens"].fill_null(0).to_numpy() if "cached_tokens" in told.columns else 0)
    pieces = told["chunks"].list.len().to_numpy()
    request = np.repeat(np.arange(len(told)), pieces)
    at = told["chunks"].explode().to_numpy() + np.repeat(told["first_token"].to_numpy(), pieces)
    order = np.argsort(at, kind="stable")
    request, at = request[order], at[order]
    gaps = told["chunks"].list.diff(null_behavior="drop").explode().drop_nulls().to_numpy()
    if gaps.size < FEWEST // 10:
        return nothing
    step = _steps(request, at, 0.5 * float(np.quantile(gaps, 0.05)))
    count = int(step[-1]) + 1
    begins = np.searchsorted(step, np.arange(count + 1))
    ended = at[begins[:-1]]
    with np.errstate(invalid="ignore"):
        apart = (at[begins[1:] - 1] - ended) / (np.diff(begins) - 1)
    sequences, kv, first, pairs, going_on = np.zeros((5, count))
    unclear = ended >= before
    places = np.split(step[np.argsort(request, kind="stable")], np.cumsum(pieces)[:-1])
    for r, mine in enumerate(places):
        begin, end = mine[0], mine[-1]
        absent = np.diff(mine) - 1
        silent = absent[absent <= MOST_ABSENT].sum()
        whole = pieces[r] + silent == response[r]  # else which step it began with is not known, or why it was absent
        for k in np.flatnonzero(absent > (MOST_ABSENT if whole else 0)):  # preempted: its resumption is like a prompt
            unclear[mine[k] + 1 : mine[k + 1] + 1] = True
        if not whole:
            unclear[max(0, begin - MOST_ABSENT) : begin + 1] = True
            unclear[end + 1 : end + 1 + MOST_ABSENT] = True
        sequences[begin : end + 1] += 1
        going_on[begin + 1 : end + 1] += 1
        first[begin] += computed[r] - 1
        pairs[begin] += computed[r] * (prompt[r] - computed[r] + computed[r] / 2)
        kv[begin] += prompt[r] - computed[r]
        kv[begin + 1 : end + 1] += prompt[r] + np.arange(1, end - begin + 1)
    tokens = sequences + first
    for k in np.flatnonzero(tokens > budget):  # some of these prompts were computed before
        unclear[max(0, k - int(tokens[k] // budget) - 1) : k + 1] = True
    known_steps = ~unclear & (going_on > 0)
    took = np.diff(ended, prepend=ended[0])
    return Steps(*(each[known_steps] for each in (took, tokens, sequences, kv, pairs, apart)))


def _steps(request: np.ndarray, at: np.ndarray, apart: float) -> np.ndarray:
    """The number of the step that each token came from: the next one begins where a request has a second token, or
    after more than `apart` seconds without any."""
    step = np.zeros(len(request), np.int64)
    now, here = 0, set[int]()
    late = np.diff(at, prepend=at[0]) > apart
    for k, (r, pause) in enumerate(zip(request.tolist(), late.tolist(), strict=True)):
        if pause or r in here:
            now += 1
            here.clear()
        here.add(r)
        step[k] = now
    return step
