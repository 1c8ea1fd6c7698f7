"""Hand-written kernels: one folder an op, one file an implementation.

A kernel file knows arrays, tiles and the target it is written for. It does not know how it was chosen:
`crosstile.dispatch` stands in front, and imports point from there to here only.
"""
