"""Routers side by side: the runs of a comparison, what they have done, and the table of it."""
