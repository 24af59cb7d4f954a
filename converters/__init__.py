"""Weights and caches of PyTorch projects, converted both ways; the command line is `__main__.py`.

lightwam, wan_dit, wan_vae, umt5 are the tables (`rules.py` says what a row is), layouts knows whose
file it is, locate finds it, files reads and writes it, convert moves it. policy assembles a
checkpoint that acts, inspect describes a file, caches and import_caches take over the reference's
caches, parity/ compares with its tensors.
"""
