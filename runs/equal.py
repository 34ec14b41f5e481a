"""Iterations of a recipe that cost what another one costs: python runs/equal.py REFERENCE -- RECIPE [KEY=VALUE ...]

REFERENCE may have overrides too. Budgets are forwards per sample, batch sizes being equal.
"""

import sys
from itertools import accumulate, count

from advdmd.recipes.find import resolve


def main() -> None:
    split = sys.argv.index("--")
    (name, *changes), (other, *others) = sys.argv[1:split], sys.argv[split + 1 :]
    reference, recipe = resolve(name, changes)[1], resolve(other, others)[1]
    budget = reference.forwards_until(reference.iterations) * reference.batch / recipe.batch
    spent = accumulate(sum(recipe.forwards(i).values()) for i in count())
    print(next(n for n, total in enumerate(spent, start=1) if total >= budget))


if __name__ == "__main__":
    main()
