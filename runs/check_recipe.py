"""Whether a kept run is of the recipe that would be run now.

    python runs/check_recipe.py KEPT/recipe.yaml RECIPE [KEY=VALUE ...]

Ends with status 1 and the differences if it is not: results of two recipes must not be averaged.
"""

import sys

from advdmd.recipes.overrides import diff
from advdmd.recipes.registry import resolve


def main() -> None:
    kept, wanted = resolve(sys.argv[1])[1], resolve(sys.argv[2], sys.argv[3:])[1]
    if kept != wanted:
        sys.exit(f"{sys.argv[1]} is of another recipe ({'; '.join(diff(kept, wanted))}): move its folder away")


if __name__ == "__main__":
    main()
