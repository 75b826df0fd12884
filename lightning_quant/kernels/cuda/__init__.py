"""Products of few bits on GPUs. Importing these files needs neither a GPU nor Triton, and compiles nothing."""
