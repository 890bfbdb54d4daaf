"""One module a verb: its command line, and what it calls in which order."""
