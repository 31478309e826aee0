"""Schemathesis makes up requests from the server's own OpenAPI description, over a real socket."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from serving import TIGHT, Brightest, running

# A made-up string is hardly ever a picture, so what fits the description is mostly refused, and rightly.
LEFT_OUT = "positive_data_acceptance"
COMMAND = "from schemathesis.cli import schemathesis; schemathesis()"


def test_the_server_keeps_what_its_description_promises(tmp_path: Path) -> None:
    """All of its checks: no 5xx, only documented statuses, types and shapes, no way round the key."""
    key = "sesame-street"
    with running(Brightest(tmp_path), key=key, limits=TIGHT) as client:
        words = ["run", f"{client.url}/openapi.json", "--checks", "all", "--exclude-checks", LEFT_OUT]
        words += ["--max-examples", "20", "--seed", "1", "--no-color", "--request-timeout", "20"]
        words += ["--header", f"Authorization: Bearer {key}"]
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, *words],
            cwd=tmp_path,  # where no file of somebody's configures it
            env={**os.environ, "PYTHONWARNINGS": "ignore"},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert client.alive()
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "Tested: 6" in done.stdout
    cases = re.search(r"(\d+) generated, (\d+) passed", done.stdout)
    assert cases is not None and int(cases[1]) == int(cases[2]) > 80
