import sys

if sys.argv[:1] == ["-m"]:  # until its module is found: what it imports takes seconds
    from lightwam_jax import interrupts

    interrupts.listen()
