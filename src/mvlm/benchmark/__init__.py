"""The six benchmarks of the paper's tables: their files, prompts and scores, and the one loop that answers them."""
