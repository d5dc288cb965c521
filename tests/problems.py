"""Problems of numbers that sums round, for every solver."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import strategies as st

from mpsearch.problem import Problem

NASTY = [0.0, -0.0, 5e-324, 1e-310, 1e-300, 0.1, 0.2, 0.3, 0.1 + 0.2, 1.0, 1.0 + 2.0**-52, -1.0, 7.0, 2.0**53, 1e300]


@st.composite
def nasty_problems(draw: st.DrawFn) -> Problem:
    rows, formats, budgets = draw(st.integers(0, 4)), draw(st.integers(1, 3)), draw(st.integers(0, 2))
    loss = st.sampled_from([*NASTY, -1e300, -1e-300, math.nan, math.inf]) | st.floats(-10.0, 10.0)
    cost = st.sampled_from([*NASTY, -1e300]) | st.integers(0, 9).map(float)
    cells = rows * formats
    losses = np.array(draw(st.lists(loss, min_size=cells, max_size=cells))).reshape(rows, formats)
    costs = np.array(draw(st.lists(cost, min_size=budgets * cells, max_size=budgets * cells)))
    costs = costs.reshape(budgets, rows, formats)
    limits = []
    for table in costs:
        columns = draw(st.lists(st.integers(0, formats - 1), min_size=rows, max_size=rows))
        met = math.fsum(table[np.arange(rows), columns].tolist())
        limits.append(draw(st.sampled_from([met, math.nextafter(met, -math.inf), math.inf]) | cost))
    return Problem(losses, costs, np.array(limits, dtype=float))
