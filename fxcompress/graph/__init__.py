"""The operator graph: recording it, its canonical operators, how models are called."""
