"""Prompts and images: reading them, encoding them once, and the samples of each train step."""
