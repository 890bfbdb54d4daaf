"""Training data: shards on disk, the order they are read in, and the embedded digits."""
