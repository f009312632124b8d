"""Text without models: languages, Markdown, splitting at token limits and stop sequences, and the cache of vectors."""
