"""Mixture of experts: routing, capacity, dispatch, experts.  Knows nothing of DeepSpeed."""
