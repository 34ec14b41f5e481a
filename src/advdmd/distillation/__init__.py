"""A recipe as a run: its networks and data, validation, sample grids, memory."""
