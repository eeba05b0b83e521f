"""The command line. Importing it does not load torch or transformers; running a command may.

Each command is a module with `ABOUT` (its texts), `Options` (a dataclass) and `run(options)`.
"""

import argparse
import errno
import io
import os
import sys
from collections.abc import Sequence
from types import ModuleType

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
    serve,
    sft,
    train,
)
from shiftrm.cli.options import Parser, add_commands, read
from shiftrm.config import at_home
from shiftrm.errors import UserError, missing_embedding, shortened, suggest
from shiftrm.locks import holding
from shiftrm.progress import quieten_libraries, reporting, speaks

COMMANDS: dict[str, ModuleType] = {
    "demo": demo,
    "run": run,
    "report": report,
    "convert": convert,
    "sft": sft,
    "train": train,
    "sample": sample,
    "adapt": adapt,
    "optimise": optimise,
    "score": score,
    "serve": serve,
    "diagnose": diagnose,
    "evaluate": evaluate,
    "meta-train": meta_train,
    "meta-test": meta_test,
}

EPILOG = """examples:
  shiftrm demo                       the whole loop on the embedded gold world, in minutes
  shiftrm demo --seed 1 --output runs/seed-1
  shiftrm report runs/demo           remake the page from the run's records
  shiftrm COMMAND --help             options of a command, with examples
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Return the exit status: 0 done, 1 failed, 2 bad input, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):  # file names may contain bytes that are not text
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    words = [at_home(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    parser = build_parser()
    if words and not words[0].startswith("-") and words[0] not in COMMANDS:
        parser.error(f"unknown command {words[0]!r}{suggest(words[0], list(COMMANDS))}")
    args, others = parser.parse_known_args(words)
    if args.help:
        topic = getattr(args.module, "topic_help", lambda _: None)(others)
        print(args.parser.format_help() if topic is None else topic, end="")
        args.parser.exit()
    quieten_libraries()
    options = args
    try:
        options = read(args.module.Options, args, others)
        with reporting(words[0], speaks=speaks()), holding(words):
            args.module.run(options)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":  # under accelerate, one process reports for all
            print(f"shiftrm: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = args.module.ABOUT.again
        print(f"shiftrm: interrupted; give the same command again {again}", file=sys.stderr)
        return 130
    except OSError as error:
        output = getattr(options, "output", None)
        advice = _output_advice(error, output)
        if advice is None:
            raise
        where = str(error.filename or output or "output")
        what = UserError(f"{shortened(where)}: {error.strerror}")
        print(f"shiftrm: error: {what}; {advice}", file=sys.stderr)
        return 2
    except IndexError as error:
        explained = missing_embedding(error)
        if explained is None:
            raise
        print(f"shiftrm: error: {explained}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not str(error).startswith("stage "):
            raise
        print(f"shiftrm: {error}", file=sys.stderr)
        return 1
    return 0


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
            return "it was removed or cannot be created; choose another output"
    return None


def build_parser() -> Parser:
    """Return the parser with all commands."""
    parser = Parser(
        prog="shiftrm",
        description="Measures whether a reward model still works after RLHF has moved the policy, "
        "and adapts it to unlabelled responses.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"shiftrm {__version__}")
    add_commands(parser, COMMANDS)
    return parser
