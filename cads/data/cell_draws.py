"""Draws from cells of examples, in shares that may change at every draw; within a cell each example comes in turn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cads.errors import DataError


class CellDraws:
    """Divides examples into cells, and draws from the cells in given shares.

    A cell whose share asks for a fraction of an example is owed it: what cells are owed carries over to the next draw
    (`take`), so that the numbers drawn never differ from the shares by more than about one. Each cell goes through its
    examples in an order that is drawn anew for each of its epochs. Of examples with equal contents in one cell one
    comes in each epoch, in turn.

    Memory: 8 bytes an example, and 12 more for each one that has a copy.

    Args:
        cells: the cell of each example, int in 0..n_cells-1, shape (N,).
        n_cells: number of cells; some may be empty.
        order: the positions in an order that does not depend on the files, such as that of ids, int64, shape (N,).
        copies: a code of the contents of each example, int64, shape (N,): equal codes are copies. None: no copies.
        seed: of the orders.

    Attributes:
        mass: of each cell, shape (n_cells,): the number of different contents, where each of k copies counts 1/k.

    Raises:
        DataError: if there is no example.
    """

    def __init__(
        self, cells: np.ndarray, n_cells: int, order: np.ndarray, copies: np.ndarray | None, seed: int
    ) -> None:
        if not len(cells):
            raise DataError("nothing to draw from: no example")
        self._seed = seed
        by_cell = order[np.argsort(cells[order], kind="stable")]
        self._members: np.ndarray = by_cell.astype(np.int32 if len(cells) < 2**31 else np.int64)
        sizes = np.bincount(cells, minlength=n_cells)
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        self._copied = Copied.of(np.arange(0) if copies is None else copies, order)
        counted = 1.0 / self.copies if len(self._copied.positions) else None
        self.mass: np.ndarray = np.bincount(cells, weights=counted, minlength=n_cells).astype(np.float64)
        self._line = self._members.copy()
        self._epochs = np.full(n_cells, -1, dtype=np.int64)
        self._next = np.zeros(n_cells, dtype=np.int64)
        self._ends = np.zeros(n_cells, dtype=np.int64)
        # Cells begin at different phases: otherwise all cells of equal share would come in the same draws.
        self._owed = np.random.default_rng((seed, 0)).random(n_cells) - 0.5

    @property
    def copies(self) -> np.ndarray:
        """How many examples have the contents of each, itself included, int32, shape (N,)."""
        numbers = np.ones(len(self._members), dtype=np.int32)
        numbers[self._copied.positions] = self._copied.numbers
        return numbers

    def take(self, shares: np.ndarray, count: int) -> np.ndarray:
        """`count` positions, from the cells in proportion to `shares` (shape (n_cells,), >= 0), int64, shape (count,).

        Raises:
            DataError: if the shares are not finite, negative, or 0 in all cells that have examples.
        """
        shares = np.where(self.mass > 0, shares, 0.0)
        total = shares.sum()
        if not (np.isfinite(total) and total > 0 and (shares >= 0).all()):
            raise DataError("shares to draw by must be finite, >= 0 and not all zero")
        self._owed += shares * (count / total)
        # A cell whose share fell to 0 is owed nothing any more.
        self._owed[shares == 0] = 0.0
        drawn = np.maximum(np.floor(self._owed), 0.0).astype(np.int64)
        positive = np.flatnonzero(shares > 0)
        while (rest := count - int(drawn.sum())) > 0:
            most_owed = np.argsort(drawn[positive] - self._owed[positive], kind="stable")
            drawn[positive[most_owed[:rest]]] += 1
        while (rest := int(drawn.sum()) - count) > 0:
            least_owed = np.argsort(np.where(drawn > 0, self._owed - drawn, np.inf), kind="stable")
            drawn[least_owed[: min(rest, np.count_nonzero(drawn))]] -= 1
        self._owed -= drawn
        return self._next_of(drawn)

    def state(self) -> dict[str, np.ndarray]:
        """All that later draws depend on."""
        return {"epochs": self._epochs.copy(), "next": self._next.copy(), "owed": self._owed.copy()}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Go on from `state`, of draws with the same arguments."""
        for cell in np.flatnonzero(state["epochs"] >= 0).tolist():
            self._begin(cell, int(state["epochs"][cell]))
        self._next = state["next"].astype(np.int64).copy()
        self._owed = state["owed"].astype(np.float64).copy()

    def _next_of(self, counts: np.ndarray) -> np.ndarray:
        """The next positions of cells, `counts` of each (int64, shape (n_cells,)), cell by cell."""
        drawn = np.flatnonzero(counts)
        over = self._next[drawn] + counts[drawn] > self._ends[drawn]
        if not over.any():
            offsets = np.repeat(self._next[drawn], counts[drawn])
            within = np.arange(len(offsets)) - np.repeat(np.cumsum(counts[drawn]) - counts[drawn], counts[drawn])
            self._next[drawn] += counts[drawn]
            return self._line[offsets + within].astype(np.int64)
        parts = []
        for cell in drawn.tolist():
            missing = int(counts[cell])
            while missing:
                if self._next[cell] == self._ends[cell]:
                    self._begin(cell, int(self._epochs[cell]) + 1)
                n = min(missing, int(self._ends[cell] - self._next[cell]))
                # A copy: the next epoch is laid out in the same place.
                parts.append(self._line[self._next[cell] : self._next[cell] + n].copy())
                self._next[cell] += n
                missing -= n
        return np.concatenate(parts).astype(np.int64)

    def _begin(self, cell: int, epoch: int) -> None:
        """Lay out the examples of an epoch of a cell."""
        start, end = self._starts[cell], self._starts[cell + 1]
        members = self._members[start:end]
        if len(self._copied.positions):
            members = members[self._copied.has_turn(members, epoch)]
        shuffled = np.random.default_rng((self._seed, 1, cell, epoch)).permutation(members)
        self._line[start : start + len(shuffled)] = shuffled
        self._epochs[cell], self._next[cell], self._ends[cell] = epoch, start, start + len(shuffled)


@dataclass(frozen=True)
class Copied:
    """The examples that have copies.

    Attributes:
        positions: of these examples, ascending, int32 (int64 in pools of 2**31 examples), shape (M,).
        ranks: of each among its copies, int32, shape (M,). numbers: of its copies, itself included, int32, shape (M,).
    """

    positions: np.ndarray
    ranks: np.ndarray
    numbers: np.ndarray

    @classmethod
    def of(cls, codes: np.ndarray, order: np.ndarray) -> Copied:
        """Those of examples whose contents have `codes` (int64, shape (N,)), ranked in `order` (shape (N,))."""
        counts = np.bincount(codes)
        in_order = order[counts[codes[order]] > 1] if len(codes) else order[:0]
        by_code = in_order[np.argsort(codes[in_order], kind="stable")]
        first = np.diff(codes[by_code], prepend=-1) != 0
        starts = np.maximum.accumulate(np.where(first, np.arange(len(by_code)), 0))
        ranks = np.arange(len(by_code)) - starts
        ascending = np.argsort(by_code)
        positions = by_code[ascending]
        return cls(
            positions.astype(np.int32 if len(codes) < 2**31 else np.int64),
            ranks[ascending].astype(np.int32),
            counts[codes[positions]].astype(np.int32),
        )

    def has_turn(self, members: np.ndarray, epoch: int) -> np.ndarray:
        """Which of `members` (positions, shape (m,)) come in an epoch: one of each set of copies; bool, shape (m,)."""
        at = np.minimum(np.searchsorted(self.positions, members), len(self.positions) - 1)
        copied = self.positions[at] == members
        return ~copied | ((epoch + self.ranks[at]) % self.numbers[at] == 0)
