"""`headstart export`: a finished run as a bundle that others can use without headstart."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headstart.cli import outcome
from headstart.cli.options import Json
from headstart.errors import ConfigError

if TYPE_CHECKING:
    from headstart.ship.export import Exported


def run(
    source: Annotated[
        Path, typer.Argument(help="The folder of a run, of a comparison, or of a model.", show_default=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", help="Where the bundle goes; a new folder, or a bundle."),
    ] = None,
    format: Annotated[  # the flag is called that
        str,
        typer.Option("--format", metavar="A,B", help="Of safetensors, onnx and pt2, with commas between."),
    ] = "safetensors,onnx",
    accuracy: Annotated[
        float, typer.Option(help="Wanted of the answers; below the threshold for it they are `unsure`.")
    ] = 0.95,
    with_preprocessing: Annotated[
        bool,
        typer.Option(
            "--with-preprocessing", help="One more ONNX file that takes uint8 pictures of any size."
        ),
    ] = False,
    static: Annotated[
        bool,
        typer.Option("--static", help="Of a network with routes: one way for all pictures, scored anew."),
    ] = False,
    data: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Where the run's pictures lie now, or any others to verify with."),
    ] = None,
    pictures: Annotated[int, typer.Option(help="With how many held-out pictures to verify.")] = 100,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare what was written with the trained network.")
    ] = True,
    push: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Put the bundle on the Hugging Face Hub.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="With --push: only you can see it.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --push: say what would be sent, and send nothing.")
    ] = False,
    json: Json = False,
) -> int:
    """Turn a run into a bundle that others can use: weights, ONNX, labels, preprocessing, model card.

    What was written is run on pictures that the network did not learn from, and must give the same labels.
    Ends with 2 where a format could not be written and the others were.

    Example: headstart export runs/first --out bundle --format safetensors,onnx,pt2
    """
    if out is None:
        raise ConfigError("Where should the bundle go? Give a new folder with --out.")
    if push is None and (dry_run or private):
        raise ConfigError("--dry-run and --private belong to --push OWNER/NAME.")

    from headstart.ship.export import export
    from headstart.ship.push import plan
    from headstart.ship.push import push as send

    if push is not None:
        plan(push)  # a name that is none is said before the work
    done = export(
        source,
        out,
        formats=[name.strip() for name in format.split(",") if name.strip()],
        with_preprocessing=with_preprocessing,
        static=static,
        accuracy=accuracy,
        data=data,
        pictures=pictures,
        check=verify,
        say=outcome.say,
    )
    sent = None if push is None else send(out, push, private=private, dry_run=dry_run)
    if json:
        outcome.show_json(
            {
                "folder": str(out),
                "calibration": done.calibration.to_dict(),
                "verified": done.verified,
                "not_written": done.not_written,
                "push": sent,
            }
        )
    else:
        _show(done, out)
        if sent is not None:
            _show_sent(sent, dry_run)
    return outcome.SOME_FAILED if done.not_written else outcome.GOOD


def _show(done: Exported, out: Path) -> None:
    print(f"Bundle: {out}")
    for path in sorted(out.iterdir()):
        print(f"  {path.name:<24} {path.stat().st_size / 1e6:8.2f} MB")
    for name, said in done.verified.items():
        print(
            f"Verified {name}: {said['agreed']} of {said['pictures']} labels agree, probabilities differ by "
            f"{said['largest_difference']:.1e} at most"
        )
    calibration = done.calibration
    if calibration.val is not None:
        val = calibration.val
        print(
            f"Calibrated: temperature {calibration.temperature:.3f}, calibration error "
            f"{val.calibration_error_before:.3f} -> {val.calibration_error:.3f} on {val.n} val pictures"
        )
    if calibration.threshold is None:
        print(f"Unsure: always, no threshold reaches an accuracy of {calibration.wanted:.0%} on val")
    elif calibration.wanted is not None:
        print(f"Unsure: below {calibration.threshold:.3f}, for an accuracy of {calibration.wanted:.0%}")
    print(f"Next:   headstart predict {out} PICTURES")


def _show_sent(sent: dict[str, object], dry_run: bool) -> None:
    print(f"{'Would be sent' if dry_run else 'Sent'} to {sent['url']}:")
    files = sent["files"]
    assert isinstance(files, dict)
    for name, size in files.items():
        print(f"  {name:<24} {size / 1e6:8.2f} MB")
