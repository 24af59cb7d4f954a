import lightwam_jax  # noqa: F401  (under python -m it listens to Ctrl-C from here on)
