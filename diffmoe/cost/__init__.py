"""What a run will cost, computed from its configuration: parameters, bytes, messages, seconds.  No
torch: a login node asks.
"""
