"""Backbones of published models, their networks and adapters, loading and sampling."""
