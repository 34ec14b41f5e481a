"""AdvDMD: few-step students of text-to-image flow models, distilled with an online adversarial reward."""

__version__ = "0.1.0"
