"""Experiments from trace to finding, each a short script over the verbs."""
