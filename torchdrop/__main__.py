"""The command line: ``python -m torchdrop demo``."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch

_OPTIONAL = {
    "matplotlib": "matplotlib",
    "numpy": "numpy",
    "sklearn": "scikit-learn",
    "torchmetrics": "torchmetrics",
    "tqdm": "tqdm",
}


class _Parser(argparse.ArgumentParser):
    """Errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def _whole(lowest: int, highest: int | None = None) -> Callable[[str], int]:
    rule = f"from {lowest} to {highest}" if highest is not None else f"of at least {lowest}"

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = lowest - 1
        if number < lowest or (highest is not None and number > highest):
            raise argparse.ArgumentTypeError(f"must be a whole number {rule}, got {text!r}")
        return number

    return read


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.zeros(1, device=device).tolist()
    except Exception as error:
        # Which class is raised depends on the kind of device and on how PyTorch was built.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise argparse.ArgumentTypeError(
            f"must be a device that PyTorch can use here, got {text!r}: {reason}"
        ) from None
    return device


def _folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("must be the name of a folder, got ''")
    return Path(text)


def _parsers() -> tuple[_Parser, _Parser]:
    parser = _Parser(prog="python -m torchdrop", description="torchdrop: dropout for PyTorch.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="command")
    demo = commands.add_parser(
        "demo",
        help="dropout and Monte Carlo inference on handwritten digits and on a curve",
        description="Train a network on handwritten digits with a keep_prob per layer and without dropout, average "
        "Monte Carlo passes, print how accurate and how well calibrated each is, fit a curve to see where a network "
        "with dropout is uncertain, and write figures.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    # Seeds count up from the given one and must still fit in 64 bits.
    demo.add_argument("--seed", type=_whole(0, 2**63 - 1), default=0, metavar="N", help="seed of the first repetition")
    demo.add_argument("--seeds", type=_whole(1), default=6, metavar="N", help="repetitions to average over")
    demo.add_argument("--epochs", type=_whole(1), default=150, metavar="N", help="epochs of training, per network")
    demo.add_argument("--samples", type=_whole(1), default=100, metavar="K", help="Monte Carlo passes over the digits")
    demo.add_argument("--output", type=_folder, default="torchdrop-demo", metavar="FOLDER", help="where figures go")
    demo.add_argument("--device", type=_device, default="cpu", help="device to run on, such as cpu or cuda")
    return parser, demo


def _make_writable(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status. A bad value is one line on stderr and ``SystemExit(2)``."""
    parser, demo = _parsers()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        from .demo.run import run
    except ModuleNotFoundError as error:
        missing = _OPTIONAL.get((error.name or "").partition(".")[0])
        if missing is None:
            raise
        demo.error(f"the demo needs {missing}, which is not installed: pip install 'torchdrop[demo]'")
    try:
        _make_writable(options.output)
    except OSError as error:
        demo.error(
            f"argument --output: must be a folder that can be written to, got '{options.output}': {error.strerror}"
        )
    try:
        run(
            seed=options.seed,
            seeds=options.seeds,
            epochs=options.epochs,
            samples=options.samples,
            output=options.output,
            device=options.device,
        )
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
