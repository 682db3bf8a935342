"""mvlm: an experiment kit for small vision-language models (MobileVLM V2, arXiv 2402.03766)."""

__version__ = "0.1.0"
