"""Worlds: teacher and student as exact language models, so that what estimators should find is computed.

`tables` (automata as tables), `catalogue` (the worlds) and `truth` (dynamic programming) are numpy and never
import torch; `automaton` makes the torch modules that the sampling and scoring code runs on.
"""
