"""The worker: a background process that keeps models loaded and runs the jobs of later calls."""
