"""The command line: one file a command, named like the command; app.py puts them together."""
