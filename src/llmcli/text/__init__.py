"""Text without models: languages, Markdown, chunking, stop sequences and the cache of vectors."""
