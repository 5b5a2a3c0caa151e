"""Which copula keeps the joint lengths: grid or Gaussian, fitted to one half of a real trace and judged on the other.

    SQUALL_TRACES=... python benchmarks/copulas.py

Prints, for each trace and copula, the largest distance of the joint distribution functions on a 19 x 19 grid of
quantiles, and the mean error of the mean response in each tenth of the requests. The last line of each trace is the
real half itself, the best that any model could reach.
"""

import os
from itertools import pairwise
from pathlib import Path

import numpy as np

from squall.trace import read_trace
from squall.workload.lengths import GaussianCopula, GridCopula, Lengths, fit_lengths, ranks, spearman

TRACES = ("azure-2023/AzureLLMInferenceTrace_conv.csv", "mooncake/conversation_trace.jsonl")
Pairs = tuple[np.ndarray, np.ndarray]


def joint(pairs: Pairs, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.array([[((pairs[0] <= a) & (pairs[1] <= b)).mean() for b in y] for a in x])


def distance(model: Pairs, real: Pairs) -> tuple[float, float]:
    levels = np.linspace(0.05, 0.95, 19)
    x, y = (np.quantile(side, levels) for side in real)
    edges = np.quantile(real[0], np.linspace(0, 1, 11))
    edges[0] = -1
    means = [np.array([b[(a > low) & (a <= high)].mean() for low, high in pairwise(edges)]) for a, b in (model, real)]
    return float(np.abs(joint(model, x, y) - joint(real, x, y)).max()), float(np.abs(means[0] / means[1] - 1).mean())


def grid(pairs: Pairs, size: int, rng: np.random.Generator) -> GridCopula:
    u, v = ((ranks(side, rng) * size).astype(int) for side in pairs)
    cells = np.bincount(u * size + v, minlength=size * size).reshape(size, size)
    return GridCopula((cells / cells.sum(1, keepdims=True)).tolist())


def main() -> None:
    for name in TRACES:
        table = read_trace(Path(os.environ["SQUALL_TRACES"]) / name).table
        lengths = table["request_tokens"].to_numpy(), table["response_tokens"].to_numpy()
        rng = np.random.default_rng(1)
        order = rng.permutation(len(table))
        seen, held = (tuple(side[order[half::2]] for side in lengths) for half in (0, 1))
        law = fit_lengths(seen[0], seen[1], rng)
        correlation = 2 * np.sin(np.pi * spearman(*seen) / 6)
        copulas = {"Gaussian": GaussianCopula(correlation)} | {f"grid {k}": grid(seen, k, rng) for k in (8, 16, 32)}
        print(name)
        for label, copula in copulas.items():
            drawn = Lengths(law.request, law.response, copula).draw(200_000, rng)
            far, off = distance(drawn, held)
            print(f"  {label:10s} joint distance {far:.3f}  mean response by tenth {100 * off:5.1f} % off")
        far, off = distance(seen, held)
        print(f"  {'real half':10s} joint distance {far:.3f}  mean response by tenth {100 * off:5.1f} % off")


if __name__ == "__main__":
    main()
