"""The verbs of the command line, one file per group. Heavy imports stand inside the functions: help answers at once."""
