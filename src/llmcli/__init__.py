"""Every local language model as a Unix filter."""

__version__ = "0.1.0"
