"""The compiler's middle end: from a model to a parareal network, without I/O."""
