"""Rectangular sparse assignment: every row gets a column of its own, at the least total cost.

Three solvers of one problem, given as padded candidate lists (row i may take columns[i, k] at costs[i, k]):

  exact          LAPJVsp (SciPy), in whole hundredths of a cost unit as the published solver rounds them
  auction        Bertsekas' forward auction, one bid at a time (numba)
  auction_torch  the same auction, all bids at once, on whatever device the tensors are (CPU or CUDA)

The auction starts from zero prices, which rectangular problems need (prices kept from a coarser ε are wrong
there), and ends within rows·ε of the optimum; ε is chosen so that this is at most 1e-4 of it.  It knows
nothing
of images.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numba
import numpy as np
from numpy.typing import NDArray

from adapt.labels.errors import EdgeError

if TYPE_CHECKING:
    import torch

__all__ = ["auction", "auction_torch", "exact", "tolerance"]

GAP = 1e-4
ROUNDS = 200_000


def tolerance(costs: NDArray[np.float64], counts: NDArray[np.int64]) -> float:
    """The ε at which rows·ε <= 1e-4 of a lower bound of the optimum (each row's cheapest), 0.01 at most."""
    return _epsilon(float(_cheapest(costs, counts).mean()))


@numba.njit(cache=True, nogil=True)
def _cheapest(costs, counts):  # type: ignore[no-untyped-def]
    """Each row's least cost, float64 [n]."""
    out = np.empty(counts.size)
    for i in range(counts.size):
        out[i] = costs[i, : counts[i]].min()
    return out


def _epsilon(bound: float) -> float:
    return min(0.01, max(GAP * bound, 1e-9))


def exact(
    columns: NDArray[np.int32], costs: NDArray[np.float64], counts: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The optimal choice k of each row, int64 [n], in costs rounded to hundredths.

    columns: int32 [n,K]; costs: float64 [n,K]; counts: int64 [n], how many candidates a row has.
    Raises EdgeError where no complete assignment exists.
    """
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    n = len(counts)
    valid = np.arange(columns.shape[1]) < counts[:, None]
    names, column = np.unique(columns[valid], return_inverse=True)
    weights = np.rint(100 * costs[valid]) + 1  # + 1: a sparse matrix drops explicit zeros
    # A column of its own for every row, dearer than any detour, keeps SciPy's feasibility search trivial (on
    # the bare graph it can take exponential time: scipy#26147).
    slack = float(weights.max()) * (n + 1)
    starts = np.concatenate([[0], np.cumsum(counts + 1)])
    indices = np.empty(starts[-1], np.int32)
    data = np.empty(starts[-1])
    own = starts[1:] - 1
    rest = np.ones(len(indices), bool)
    rest[own] = False
    indices[rest], data[rest] = column, weights
    indices[own], data[own] = len(names) + np.arange(n), slack
    graph = csr_array((data, indices, starts), shape=(n, len(names) + n))
    _, chosen = min_weight_full_bipartite_matching(graph)
    if (chosen >= len(names)).any():
        raise EdgeError("assignment: some rows cannot have a column of their own; give them more candidates")
    wanted = names[chosen]
    return np.asarray(((columns == wanted[:, None]) & valid).argmax(1))


@numba.njit(cache=True, nogil=True)
def _auction(columns, costs, counts, epsilon, n_columns, limit):  # type: ignore[no-untyped-def]
    n = counts.size
    price = np.zeros(n_columns)
    owner = np.full(n_columns, -1, np.int32)
    choice = np.full(n, -1, np.int64)
    queue = np.arange(n).astype(np.int32)
    head, waiting = 0, n
    bids = 0
    while waiting > 0:
        bids += 1
        if bids > limit:
            return choice, False
        i = queue[head]
        head = (head + 1) % n
        waiting -= 1
        best, second, at = np.inf, np.inf, 0
        for k in range(counts[i]):
            value = costs[i, k] + price[columns[i, k]]
            if value < best:
                second = best
                best = value
                at = k
            elif value < second:
                second = value
        if second == np.inf:
            # The only candidate: outbid everyone for good.
            second = best + 1e9
        j = columns[i, at]
        price[j] += second - best + epsilon
        loser = owner[j]
        owner[j] = i
        choice[i] = at
        if loser >= 0:
            choice[loser] = -1
            queue[(head + waiting) % n] = loser
            waiting += 1
    return choice, True


def auction(
    columns: NDArray[np.int32],
    costs: NDArray[np.float64],
    counts: NDArray[np.int64],
    epsilon: float | None = None,
) -> NDArray[np.int64]:
    """A choice k of each row within rows·ε of the optimum, int64 [n].  Arguments as ``exact``."""
    epsilon = tolerance(costs, counts) if epsilon is None else epsilon
    limit = ROUNDS * max(1, len(counts))
    choice, done = _auction(columns, costs, counts, epsilon, int(columns.max()) + 1, limit)
    if not done:
        raise EdgeError("assignment: some rows cannot have a column of their own; give them more candidates")
    return np.asarray(choice)


def auction_torch(
    columns: torch.Tensor, costs: torch.Tensor, counts: torch.Tensor, epsilon: float | None = None
) -> torch.Tensor:
    """The auction with all unassigned rows bidding at once: int64 [n] on the tensors' device.

    columns: int64 [n,K]; costs: float [n,K]; counts: int64 [n].  Within rows·ε of the optimum; None: the ε of
    ``tolerance``, within 1e-4 of it.
    """
    import torch

    n, width = columns.shape
    device = columns.device
    dear = float("inf")
    costs = torch.where(torch.arange(width, device=device) < counts[:, None], costs, dear)
    if epsilon is None:
        epsilon = _epsilon(float(costs.min(1).values.mean()))
    size = int(columns.max()) + 1
    price = torch.zeros(size, dtype=costs.dtype, device=device)
    owner = torch.full((size,), -1, dtype=torch.int64, device=device)
    choice = torch.full((n,), -1, dtype=torch.int64, device=device)
    rows = torch.arange(n, device=device)
    for _ in range(ROUNDS):
        free = rows[choice < 0]
        if not len(free):
            return choice
        value = costs[free] + price[columns[free]]
        two, at = value.topk(min(2, width), dim=1, largest=False)
        best, pick = two[:, 0], at[:, 0]
        second = two[:, 1] if width > 1 else torch.full_like(best, dear)
        raise_by = torch.where(torch.isinf(second), torch.full_like(best, 1e9), second - best) + epsilon
        wanted = columns[free, pick]
        bid = price[wanted] + raise_by
        high = price.scatter_reduce(0, wanted, bid, "amax")
        wins = bid == high[wanted]
        # one winner a column: the lowest row among equal bids
        first = torch.full((size,), n, dtype=torch.int64, device=device)
        first.scatter_reduce_(0, wanted[wins], free[wins], "amin")
        wins &= first[wanted] == free
        winners, taken = free[wins], wanted[wins]
        losers = owner[taken]
        choice[losers[losers >= 0]] = -1
        owner[taken] = winners
        choice[winners] = pick[wins]
        price[taken] = bid[wins]
    raise EdgeError("assignment: some rows cannot have a column of their own; give them more candidates")
