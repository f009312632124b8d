"""Languages, chunking, stop strings and the embedding cache."""
