"""One module a subcommand: its command line, and what it calls in which order."""
