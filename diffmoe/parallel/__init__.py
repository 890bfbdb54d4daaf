"""Ranks, groups, collectives and recompute.  Knows nothing of models."""
