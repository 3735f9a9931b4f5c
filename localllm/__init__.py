"""Run language models on your own machine: plan, load, decode, serve, measure."""

__version__ = "0.1.0"
