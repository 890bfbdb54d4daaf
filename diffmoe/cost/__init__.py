"""What a run will cost: parameters, bytes, messages, seconds.  No torch: a login node asks."""
