"""Whether training is healthy: diagnostics, their ranges, the HTML report."""
