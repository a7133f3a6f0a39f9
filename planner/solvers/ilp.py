"""The allocation problem as an integer linear program, solved with PuLP and HiGHS.

Sets        i in I: items; c in C[i]: their candidates; d in D: shared codebooks; l in L: limits; f in F: formats
Data        cost[i,c] >= 0; bytes[i,c]; size[d]; capacity;  use[l,i,c], use[l,d], capacity[l];  max_formats
Variables   x[i,c] in {0, 1}: item i takes candidate c;  y[d] in {0, 1}: codebook d is stored
            z[f] in {0, 1}: format f is in use;  t >= 0: share by which all capacities grow; only if minimised
Objective   min  sum_i sum_c cost[i,c] x[i,c]
Constraints choose_one[i]:  sum_c x[i,c] = 1
            budget:         sum_i sum_c bytes[i,c] x[i,c] + sum_d size[d] y[d] <= capacity (1 + t)
            limit[l]:       sum_i sum_c use[l,i,c] x[i,c] + sum_d use[l,d] y[d] <= capacity[l] (1 + t)
            shared[i,d]:    y[d] >= sum over c that need d of x[i,c]
            in_use[i,f]:    z[f] >= sum over c of format f of x[i,c]
            formats:        sum_f z[f] <= max_formats

The objective may also be t, or the bytes (then without the budget). For an infeasible problem, the smallest t that
allows a choice tells the user what to ask for. Tied matrices are one item, so choose_one ties them.

Bytes are divided by their greatest common divisor and costs are scaled, so that the solver's absolute tolerances have
no effect. The solution is rounded, and its bytes are added up again in integers. PuLP's `status` says Optimal even when
the time ran out, so `sol_status` is read instead. HiGHS's default gaps are switched off.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Literal

import pulp

from reallm.planner.problem.problem import Candidate, Problem

Objective = Literal["cost", "bytes", "stretch"]
COST_SCALE = 1e4
"""What the median cost times the number of items is scaled to."""
TOLERANCE = 1e-9
"""Feasibility tolerance of the solver."""


@dataclass(frozen=True, slots=True)
class IlpResult:
    """The answer of the solver."""

    chosen: tuple[Candidate, ...] | None
    """A feasible choice, or None when none was found."""
    best_bound: float
    """Lower bound of the objective."""
    status: Literal["optimal", "feasible", "infeasible", "unknown"]


def solve_ilp(problem: Problem, time_limit_s: float, objective: Objective = "cost") -> IlpResult:
    """Minimise the cost, the bytes (ignoring the budget) or t, the share by which all capacities grow."""
    scale = _scale(problem) if objective == "cost" else 1.0
    model, x = build(problem, scale, objective)
    solver = pulp.HiGHS(
        msg=False,
        gapRel=0.0,
        gapAbs=0.0,
        threads=1,
        timeLimit=time_limit_s,
        random_seed=0,
        mip_feasibility_tolerance=TOLERANCE,
        primal_feasibility_tolerance=TOLERANCE,
        dual_feasibility_tolerance=TOLERANCE,
    )
    model.solve(solver)
    if model.sol_status == pulp.LpSolutionInfeasible:
        return IlpResult(None, 0.0, "infeasible")
    best_bound = float(model.solverModel.getInfo().mip_dual_bound) / scale
    if model.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return IlpResult(None, max(best_bound, 0.0), "unknown")
    picks = [max(range(len(row)), key=lambda c: row[c].varValue) for row in x]
    chosen = tuple(item.candidates[pick] for item, pick in zip(problem.items, picks, strict=True))
    if objective == "cost" and not problem.fits(chosen):
        return IlpResult(None, max(best_bound, 0.0), "unknown")
    status: Literal["optimal", "feasible"] = "optimal" if model.sol_status == pulp.LpSolutionOptimal else "feasible"
    return IlpResult(chosen, max(best_bound, 0.0), status)


def build(
    problem: Problem, scale: float = 1.0, objective: Objective = "cost"
) -> tuple[pulp.LpProblem, list[list[pulp.LpVariable]]]:
    """The integer program of this module as a PuLP problem, and its variables x[i][c]; `scale` multiplies the costs."""
    model = pulp.LpProblem("allocation", pulp.LpMinimize)
    x = [
        [pulp.LpVariable(f"x_{i}_{c}", cat=pulp.LpBinary) for c in range(len(item.candidates))]
        for i, item in enumerate(problem.items)
    ]
    y = {d: pulp.LpVariable(f"y_{n}", cat=pulp.LpBinary) for n, d in enumerate(problem.shared)}
    t = pulp.LpVariable("t", lowBound=0) if objective == "stretch" else None
    pairs = [
        (var, c)
        for row, item in zip(x, problem.items, strict=True)
        for var, c in zip(row, item.candidates, strict=True)
    ]
    stored = [(var, c.nbytes) for var, c in pairs] + [(y[d], problem.shared[d]) for d in y]
    if objective == "cost":
        model += pulp.LpAffineExpression([(var, c.cost * scale) for var, c in pairs]), "objective"
    else:
        model += pulp.LpAffineExpression(stored) if t is None else pulp.LpAffineExpression([(t, 1)]), "objective"
    if objective != "bytes":
        model += _within(stored, problem.capacity, t), "budget"
    for n, limit in enumerate(problem.limits):
        used = [(var, c.uses[n]) for var, c in pairs] + [(y[d], limit.shared.get(d, 0)) for d in y]
        model += _within(used, limit.capacity, t), f"limit_{n}"
    for i, (row, item) in enumerate(zip(x, problem.items, strict=True)):
        model += pulp.lpSum(row) == 1, f"choose_one_{i}"
        for n, d in enumerate(problem.shared):
            if users := [var for var, c in zip(row, item.candidates, strict=True) if d in c.shared]:
                model += y[d] - pulp.lpSum(users) >= 0, f"shared_{i}_{n}"
    if problem.max_formats is not None:
        _count_formats(model, problem, x, problem.max_formats)
    return model, x


def _within(used: list[tuple[pulp.LpVariable, int]], capacity: int, t: pulp.LpVariable | None) -> pulp.LpConstraint:
    """The constraint sum of `used` <= `capacity` (1 + `t`), in units of the greatest common divisor of all amounts."""
    unit = gcd(*(amount for _, amount in used)) or 1
    scaled = [(var, amount // unit) for var, amount in used if amount]
    if t is not None:
        return pulp.LpAffineExpression([*scaled, (t, -max(capacity, 1) / unit)]) <= capacity / unit
    return pulp.LpAffineExpression(scaled) <= capacity // unit


def _count_formats(model: pulp.LpProblem, problem: Problem, x: list[list[pulp.LpVariable]], max_formats: int) -> None:
    """Add z and the constraints in_use and formats."""
    names = sorted({c.format for item in problem.items for c in item.candidates})
    z = {name: pulp.LpVariable(f"z_{n}", cat=pulp.LpBinary) for n, name in enumerate(names)}
    for i, (row, item) in enumerate(zip(x, problem.items, strict=True)):
        for n, name in enumerate(names):
            if users := [var for var, c in zip(row, item.candidates, strict=True) if c.format == name]:
                model += z[name] - pulp.lpSum(users) >= 0, f"in_use_{i}_{n}"
    model += pulp.lpSum(z.values()) <= max_formats, "formats"


def _scale(problem: Problem) -> float:
    """The factor that brings the median cost to COST_SCALE / number of items."""
    costs = sorted(c.cost for item in problem.items for c in item.candidates if c.cost > 0)
    return COST_SCALE / (costs[len(costs) // 2] * len(problem.items)) if costs else 1.0
