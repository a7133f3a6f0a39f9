"""The integer programme, through PuLP and HiGHS.

Sets        i in I: items; c in C[i]: their candidates; d in D: shared codebooks; l in L: limits; f in F: formats
Data        cost[i,c] >= 0; bytes[i,c]; size[d]; capacity;  use[l,i,c], use[l,d], capacity[l];  most: formats at once
Variables   x[i,c] in {0, 1}: item i takes candidate c;  y[d] in {0, 1}: codebook d is stored
            z[f] in {0, 1}: format f is in use;  t >= 0: how far capacities are stretched, 0 but to explain
Objective   min  sum_i sum_c cost[i,c] x[i,c]
Constraints choose_one[i]:  sum_c x[i,c] = 1
            budget:         sum_i sum_c bytes[i,c] x[i,c] + sum_d size[d] y[d] <= capacity (1 + t)
            limit[l]:       sum_i sum_c use[l,i,c] x[i,c] + sum_d use[l,d] y[d] <= capacity[l] (1 + t)
            shared[i,d]:    y[d] >= sum over c that need d of x[i,c]
            in_use[i,f]:    z[f] >= sum over c of format f of x[i,c]
            formats:        sum_f z[f] <= most

The objective may also be the bytes, without a budget, or t: the least stretch of all capacities that leaves a choice,
which tells an infeasible problem's user what to ask for. Tied matrices are one item, so choose_one ties them. Bytes are
divided by their greatest common divisor and costs scaled so that the solver's absolute tolerances mean nothing. The
answer is rounded and its bytes added up again in integers; PuLP's status says Optimal on a time-out, so `sol_status` is
read, and HiGHS's default gaps are switched off.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from math import gcd
from typing import Literal

import pulp

from reallm.planner.problem.problem import Candidate, Problem

SOLVER = "HiGHS"
Objective = Literal["cost", "bytes", "stretch"]
COST_SCALE = 1e4
TOLERANCE = 1e-9


@dataclass(frozen=True, slots=True)
class IlpResult:
    """What the solver said: a feasible choice or None, a lower bound of the objective, and how it ended."""

    chosen: tuple[Candidate, ...] | None
    best_bound: float
    status: Literal["optimal", "feasible", "infeasible", "unknown"]


def solver_version() -> str:
    """Versions of the solver and of PuLP."""
    return f"{version('highspy')} (PuLP {version('pulp')})"


def solve_ilp(problem: Problem, time_limit_s: float, objective: Objective = "cost") -> IlpResult:
    """Minimise the cost, the bytes (then the capacity does not bind) or the stretch (then no capacity does)."""
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
    done = model.sol_status == pulp.LpSolutionOptimal
    return IlpResult(chosen, max(best_bound, 0.0), "optimal" if done else "feasible")


def build(
    problem: Problem, scale: float = 1.0, objective: Objective = "cost"
) -> tuple[pulp.LpProblem, list[list[pulp.LpVariable]]]:
    """The programme above in PuLP's terms, and its x[i][c]."""
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
    """The sum of `used` within `capacity`, stretched by `t` where given, in units of the greatest common divisor."""
    unit = gcd(*(amount for _, amount in used)) or 1
    scaled = [(var, amount // unit) for var, amount in used if amount]
    if t is not None:
        return pulp.LpAffineExpression([*scaled, (t, -max(capacity, 1) / unit)]) <= capacity / unit
    return pulp.LpAffineExpression(scaled) <= capacity // unit


def _count_formats(model: pulp.LpProblem, problem: Problem, x: list[list[pulp.LpVariable]], most: int) -> None:
    names = sorted({c.format for item in problem.items for c in item.candidates})
    z = {name: pulp.LpVariable(f"z_{n}", cat=pulp.LpBinary) for n, name in enumerate(names)}
    for i, (row, item) in enumerate(zip(x, problem.items, strict=True)):
        for n, name in enumerate(names):
            if users := [var for var, c in zip(row, item.candidates, strict=True) if c.format == name]:
                model += z[name] - pulp.lpSum(users) >= 0, f"in_use_{i}_{n}"
    model += pulp.lpSum(z.values()) <= most, "formats"


def _scale(problem: Problem) -> float:
    """Brings the middle of the costs to COST_SCALE over the number of items."""
    costs = sorted(c.cost for item in problem.items for c in item.candidates if c.cost > 0)
    return COST_SCALE / (costs[len(costs) // 2] * len(problem.items)) if costs else 1.0
