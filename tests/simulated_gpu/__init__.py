"""A GPU that is simulated: what falls on a CUDA device falls here, on any machine."""
