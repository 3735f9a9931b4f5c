"""The command line: typer commands, one module per group. Everything heavy is imported inside the commands."""
