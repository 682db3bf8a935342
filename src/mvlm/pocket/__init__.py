"""A generated world for the `pocket` model: pictures, training records and benchmarks from a seed.

`corpus.build` makes all of it; `parts.fetch` brings the pretrained parts and the drawings.
"""
