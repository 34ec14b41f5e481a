"""Judges of images: detectors and models that answer questions."""
