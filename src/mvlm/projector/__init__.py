"""Axis 1: what turns N patch features of the vision tower into M tokens of the language model (paper, section 3.3 and Table 7).

A projector is any `nn.Module` built as `Name(vision_dim, language_dim, ...)` whose forward maps (B, N, Dv) to (B, M, D). It
declares nothing else: the joined model counts M by showing it a blank grid. To add one, write `x.py` here and
`conf/projector/x.yaml`.
"""
