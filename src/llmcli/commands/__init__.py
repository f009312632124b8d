"""One file a command. Each declares its options and ends in one call."""
