"""The command line: arguments and options, and errors as one line."""
