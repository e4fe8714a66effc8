"""What was decided, as it is kept with a model and in files: plans, their sizes, their checks."""
