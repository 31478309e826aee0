"""The command line: one file per command, and `entry` that finds them.

What commands share: `options` (flags out of the fields of `Run`), `asked` (YAML files and --set),
`progress` (bars and lines on stderr), `outcome` (exit codes and last words).
"""

from __future__ import annotations

from collections.abc import Sequence

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """The command `headstart`; see `headstart.cli.entry.main`.

    Args:
        argv: what stands after `headstart`; None: the process's own, which ends after this.
    """
    try:
        # Here, not above: Ctrl-C while the first modules load is no traceback either.
        from headstart.cli import entry
    except KeyboardInterrupt:
        return INTERRUPTED
    return entry.main(argv)


__all__ = ["INTERRUPTED", "main"]
