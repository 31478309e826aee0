"""The command line: one file per command, and `entry` that finds them.

What commands share: `options` (flags out of the fields of `Run`), `asked` (YAML files and --set),
`progress` (bars and lines on stderr), `outcome` (exit codes and last words).
"""

from headstart.cli.entry import main

__all__ = ["main"]
