"""The command line. Importing it does not load torch or transformers; running a command may.

Each command is a module with `register(subparsers)`, which declares its options, `run(args)`, and
`again`, which says what repeating the command does after an interruption.
"""

import argparse
import errno
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from shiftrm import __version__
from shiftrm.cli import (
    adapt,
    convert,
    demo,
    diagnose,
    evaluate,
    meta_test,
    meta_train,
    optimise,
    report,
    run,
    sample,
    score,
    sft,
    train,
)
from shiftrm.config import at_home
from shiftrm.errors import UserError, missing_embedding, shortened
from shiftrm.locks import holding
from shiftrm.progress import reporting, speaks

COMMANDS = (
    *(demo, run, report),
    *(convert, sft, train, sample, adapt, optimise),
    *(score, diagnose, evaluate),
    *(meta_train, meta_test),
)

FOLDING = {"train": train, "adapt": adapt, "sft": sft, "optimise": optimise}

EPILOG = """examples:
  shiftrm demo                       the whole loop on the embedded gold world, in minutes
  shiftrm demo --seed 1 --output runs/seed-1
  shiftrm report runs/demo           make the page again from the run's records
  shiftrm COMMAND --help             options of a command, with examples
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Return the exit status: 0 done, 1 failed, 2 bad input, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):  # file names may contain bytes that are not text
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    parser = build_parser()
    words = [at_home(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    if words and words[0] in FOLDING:  # any setting may be a flag
        words = [words[0], *FOLDING[words[0]].fold_flags(words[1:])]
    elif words[:1] == ["run"]:
        words = [words[0], *run.options_first(words[1:])]
    elif words[:1] in (["meta-train"], ["meta-test"]):
        words = [words[0], *meta_train.settings_last(words[1:])]
    elif words[:1] == ["convert"]:
        words = [words[0], *convert.words_last(words[1:])]
    args = parser.parse_args(words)
    try:
        _check_numbers(args)
        with reporting(words[0], speaks=speaks()), holding(words):
            args.run(args)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":  # under accelerate, one process reports for all
            print(f"shiftrm: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"shiftrm: interrupted; give the same command again {args.again}", file=sys.stderr)
        return 130
    except OSError as error:
        advice = _output_advice(error, getattr(args, "output", None))
        if advice is None:
            raise
        what = UserError(f"{shortened(str(error.filename or 'output'))}: {error.strerror}")
        print(f"shiftrm: error: {what}; {advice}", file=sys.stderr)
        return 2
    except IndexError as error:
        said = missing_embedding(error)
        if said is None:
            raise
        print(f"shiftrm: error: {said}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not str(error).startswith("stage "):
            raise
        print(f"shiftrm: {error}", file=sys.stderr)
        return 1
    return 0


def _check_numbers(args: argparse.Namespace) -> None:
    """Reject seeds and counts that are out of range."""
    from shiftrm.config import check_seed

    for name, value in vars(args).items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, int) and name == "seed":
            check_seed(value, flag)
        elif isinstance(value, int) and abs(value) >= 2**31:
            raise UserError(f"{flag} is {shortened(str(value))}; it must be below 2^31")


def _output_advice(error: OSError, output: str | None) -> str | None:
    """Return advice if the output cannot be written; None for any other error."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free space, or choose another output, then give the same command again"
    name = error.filename
    if error.errno == errno.EACCES and os.path.isfile(name or "") and not os.access(name, os.R_OK):
        return "make it readable"
    if error.errno in (errno.EACCES, errno.EROFS):
        return "choose another output, or make this one writable"
    if error.errno in (errno.ENOTDIR, errno.EISDIR, errno.EEXIST):
        return "choose another output"
    if error.errno in (errno.ENAMETOOLONG, errno.ELOOP, errno.ENXIO, errno.EINVAL, errno.EPERM):
        return "give another name"
    if error.errno == errno.ENOENT and output is not None and error.filename is not None:
        folder = os.path.dirname(os.path.abspath(output))
        if os.path.abspath(os.fsdecode(error.filename)).startswith(os.path.join(folder, "")):
            return "it went away or cannot be made; choose another output"
    return None


class Parser(argparse.ArgumentParser):
    """A parser that reports unknown arguments in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"shiftrm: error: {UserError(message)}; see `{self.prog} --help`\n")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with all commands."""
    parser = Parser(
        prog="shiftrm",
        description="Reward models that keep telling responses apart after the policy has moved.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"shiftrm {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.register(subparsers)
    return parser
