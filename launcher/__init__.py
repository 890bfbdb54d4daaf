"""How a run is started: submission, checks.  Imports no torch: a login node has none."""
