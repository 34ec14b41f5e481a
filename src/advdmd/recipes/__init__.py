"""All settings of a run: recipes by name, overrides, and names of earlier versions."""
