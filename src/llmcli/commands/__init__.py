"""One file a command, found by its name: it declares the command's options and ends in one call."""
