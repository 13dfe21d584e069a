"""What the command line does, as functions: one module a command."""
