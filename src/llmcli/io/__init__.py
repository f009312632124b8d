"""Records in, results out: input formats, output, progress, resuming."""
