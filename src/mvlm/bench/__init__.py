"""Speed, each target a file with a `run(cfg)`: ours and a peer alternate in one run, and what is told is their ratio."""
