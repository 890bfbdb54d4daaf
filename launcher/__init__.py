"""How a run is started: ranks from the environment, submission, checks. Imports no torch: a login
node has none.
"""
