"""The commands as functions, one file each."""
