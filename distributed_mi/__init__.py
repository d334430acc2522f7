"""Multi-interest sequential recommenders at cluster scale, with a language model in the loop."""

__version__ = "0.1.0"
