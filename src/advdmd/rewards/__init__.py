"""Scorers of images, as rewards of a policy and as metrics."""
