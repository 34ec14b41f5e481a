"""Iterations of a recipe that cost what another one costs.

    python runs/match_budget.py REFERENCE [...] -- RECIPE [KEY=VALUE ...]

Budgets are forwards, of all samples; schedules are stretched with the iterations as the recipe's own function does it.
"""

import sys
from bisect import bisect_left

from advdmd.recipes.registry import resolve


def cost(name: str, words: list[str]) -> float:
    recipe = resolve(name, words)[1]
    return recipe.forwards_until(recipe.iterations) * recipe.batch


def main() -> None:
    split = sys.argv.index("--")
    (name, *changes), (other, *others) = sys.argv[1:split], sys.argv[split + 1 :]
    budget = cost(name, changes)
    print(bisect_left(range(10**5), budget, lo=1, key=lambda n: cost(other, [*others, f"iterations={n}"])))


if __name__ == "__main__":
    main()
