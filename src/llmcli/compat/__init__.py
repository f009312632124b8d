"""Private and version-sensitive names of foreign libraries. tests/test_compat.py probes each of them."""
