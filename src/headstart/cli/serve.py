"""`headstart serve`: a model as a service, with a page for people."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headstart.cli import outcome
from headstart.errors import ConfigError

if TYPE_CHECKING:
    from headstart.ship.limits import Limits

KEY = "HEADSTART_API_KEY"
_NEEDS = ("fastapi", "uvicorn", "python_multipart", "prometheus_client")
_SHORTEST_KEY = 8


def run(
    model: Annotated[
        Path, typer.Argument(help="The folder of a run, of a comparison, or of a model.", show_default=False)
    ],
    host: Annotated[str, typer.Option(help="0.0.0.0: whoever can reach this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    workers: Annotated[int, typer.Option(min=1, help="Processes, each with the model.")] = 1,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            envvar=KEY,
            help="Clients must send it; in the environment it is in no list of processes.",
            show_default=False,
        ),
    ] = None,
    no_key: Annotated[bool, typer.Option("--no-key", help="Let other machines in without a key.")] = False,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Answer to this name too (a proxy's).", show_default=False),
    ] = None,
    engine: Annotated[str, typer.Option(metavar="auto|onnx|torch", help="What runs the network.")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures per forward pass.")] = 16,
    batch_wait: Annotated[
        float, typer.Option(min=0, max=1000, help="Milliseconds a batch waits for pictures on their way.")
    ] = 2.0,
    max_mb: Annotated[float, typer.Option(min=0.001, help="Of one request.")] = 32,
    max_megapixels: Annotated[float, typer.Option(min=0.01, help="Of one picture.")] = 50,
    max_files: Annotated[int, typer.Option(min=1, help="Pictures in one request.")] = 32,
    max_requests: Annotated[int, typer.Option(min=1, help="Answered at once.")] = 256,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for a request, and for its answer.")] = 30,
) -> int:
    """Serve a model: POST /predict for programs, and a page at / for people. Nothing leaves this machine.

    Other machines are let in only with a key: --host 0.0.0.0 --api-key KEY.

    Example: headstart serve bundle/ --port 8000
    """
    missing = [name for name in _NEEDS if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"headstart serve needs {', '.join(missing)}. Install the extra: pip install 'headstart[serve]'"
        )
    if api_key is not None and len(api_key) < _SHORTEST_KEY:
        raise ConfigError(f"The key is too short to be one: {_SHORTEST_KEY} characters at least.")
    if api_key is not None and (not api_key.isascii() or not api_key.isprintable() or " " in api_key):
        raise ConfigError("A key is made of printable ASCII characters without spaces.")

    from headstart.ship import listening
    from headstart.ship.limits import MIB, Limits

    local = listening.is_loopback(host)
    if not local and api_key is None and not no_key:
        raise ConfigError(
            f"--host {host} lets other machines in: give them a key (--api-key, or {KEY} in the "
            "environment), or say --no-key."
        )
    limits = Limits(
        request_bytes=round(max_mb * MIB),
        pixels=round(max_megapixels * 1e6),
        files=max_files,
        requests=max_requests,
        waiting_bytes=max(Limits.waiting_bytes, round(4 * max_mb * MIB)),
        head_seconds=min(Limits.head_seconds, timeout),
        seconds=timeout,
    )
    hosts = [*listening.LOOPBACK, host, *(allow_host or [])] if local and api_key is None else None
    # Before the model: a port that is taken is said at once.
    socket = listening.bind(host, port)
    build = Building(
        model,
        engine,
        None if workers == 1 else max(1, (os.cpu_count() or 1) // workers),
        limits,
        api_key,
        hosts,
        batch_size,
        batch_wait,
    )
    address = listening.address_of(socket)
    try:
        app = build()  # in this process, so that what is wrong with it is said in a line
        classes = len(app.state.service.model.classes)
        serving = listening.Built(app) if workers == 1 else build
        del app  # with several workers each has its own

        def started() -> None:
            key = "" if api_key is None else ", with a key"
            outcome.say(f"{classes} classes at {address}{key}. Stop with Ctrl-C.")

        listening.serve(
            serving,
            [socket],
            limits=limits,
            workers=workers,
            started=started,
        )
    finally:
        socket.close()
    outcome.say("stopped.")
    return outcome.GOOD


@dataclass(frozen=True)
class Building:
    """What a worker needs to make its application; plain data, so that it can be sent to one."""

    model: Path
    engine: str
    threads: int | None  # of onnxruntime; None: its own choice
    limits: Limits
    key: str | None
    hosts: list[str] | None
    batch_size: int
    batch_wait: float  # milliseconds

    def __call__(self) -> Any:
        """The application, its model loaded."""
        from headstart.ship.predict import load
        from headstart.ship.server import application

        return application(
            load(self.model, engine=self.engine, threads=self.threads),
            limits=self.limits,
            key=self.key,
            hosts=self.hosts,
            batch_size=self.batch_size,
            patience=self.batch_wait / 1000,
        )
