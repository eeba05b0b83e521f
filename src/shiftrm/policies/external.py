"""A policy training by any other program: its command line, and the check of what it made."""

import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shiftrm.errors import UserError, shortened, suggest

__all__ = ["PLACES", "Command", "check_made", "parse_command"]

PLACES = {
    "policy": "folder (or hub name) of the policy that the round starts from",
    "reference": "folder of the policy that the KL is measured to",
    "reward": "folder of the round's reward model",
    "reward_url": "address of a server with its rewards, which the run starts for the step",
    "prompts": "JSONL file of rows with `prompt`: a text, or chat messages",
    "prompts_folder": "folder that holds only this file, for programs that read data-set folders",
    "pairs": "JSONL file of the labelled preference pairs",
    "output": "folder that the program must write; it does not exist before",
    "checkpoints": "folder for the program's checkpoints, kept until the step is complete",
    "seed": "random seed of the round",
    "round": "number of the round",
    "max_new_tokens": "of `sampling`",
    "temperature": "of `sampling`",
    "top_p": "of `sampling`",
    "processes": "of `execution`",
    "python": "the Python that runs this program",
}
"""What a command may hold in braces."""

REQUIRED = ("policy", "output")

PLACE = re.compile(r"\{\{(\w+)\}\}|\{([A-Za-z_]\w*)\}")
ASSIGNED = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)

OPERATORS = ("|", "||", "&", "&&", ";", ">", ">>", "<", "2>", "2>&1", "&>")
"""Words that only a shell understands."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class Command:
    """A command line with places in it.

    Attributes:
        environment: variables of its first words, as `NAME=value`.
        words: the program and its arguments.
    """

    environment: tuple[tuple[str, str], ...]
    words: tuple[str, ...]

    @property
    def all_words(self) -> tuple[str, ...]:
        return (*(f"{name}={value}" for name, value in self.environment), *self.words)

    @property
    def places(self) -> frozenset[str]:
        """The names of the places that it uses."""
        found = (match[2] for word in self.all_words for match in PLACE.finditer(word))
        return frozenset(name for name in found if name is not None)

    def filled(self, values: Mapping[str, Any]) -> "Command":
        """Return the command with values in its places; `{{name}}` becomes `{name}`."""

        def fill(word: str) -> str:
            return PLACE.sub(lambda m: f"{{{m[1]}}}" if m[1] else str(values[m[2]]), word)

        environment = tuple((name, fill(value)) for name, value in self.environment)
        return Command(environment, tuple(map(fill, self.words)))

    def check_program(self) -> None:
        """Check that the program is there.

        Raises:
            UserError: it is not on the path, or is no file that can be run.
        """
        program = PLACE.sub(lambda m: sys.executable if m[2] == "python" else m[0], self.words[0])
        if shutil.which(program, path=dict(self.environment).get("PATH")) is not None:
            return
        if os.path.isdir(program):
            raise UserError(f"{program}: is a folder; the command begins with a program")
        if os.path.isfile(program):
            raise UserError(f"{program}: cannot be run; give it the right with `chmod +x`")
        where = "no such file" if os.sep in program else "no such program on the PATH"
        raise UserError(f"{program}: {where}; install it, or give its path")


def parse_command(given: Any) -> Command:
    """Return a command from a list of words, or from a text that is split as a shell would.

    No shell runs it. First words such as `NAME=value` set variables of its environment.

    Raises:
        UserError: no words, an operator of the shell, an unknown place, or a missing one.
    """
    words = _words(given)
    environment: list[tuple[str, str]] = []
    while words and (found := ASSIGNED.fullmatch(words[0])):
        environment.append((found[1], found[2]))
        words = words[1:]
    if not words:
        raise UserError("names no program; give a command such as 'train.sh {policy} {output}'")
    operator = next((word for word in words if word in OPERATORS), None)
    if operator is not None:
        raise UserError(
            f"holds {operator!r}, and no shell runs it; put several commands into a script"
        )
    command = Command(tuple(environment), tuple(words))
    for name in sorted(command.places):
        if name not in PLACES:
            raise UserError(
                f"has the unknown place {{{name}}}{suggest(name, list(PLACES))} (write "
                f"{{{{{name}}}}} for the word in braces)"
            )
    for name in REQUIRED:
        if name not in command.places:
            raise UserError(f"has no place {{{name}}}, which is the {PLACES[name]}; add it")
    return command


def _words(given: Any) -> list[str]:
    if isinstance(given, str):
        try:
            return shlex.split(given.replace("\\\n", " "))
        except ValueError as error:
            raise UserError(f"cannot be split into words ({error}); close the quotation") from None
    if isinstance(given, list | tuple):
        for word in given:
            if isinstance(word, Mapping | list | tuple) or word is None:
                raise UserError(
                    f"has the word {shortened(str(word))}; write each as text, places in quotation "
                    'marks: "{policy}"'
                )
        return [("true" if w else "false") if isinstance(w, bool) else str(w) for w in given]
    raise UserError(f"is {shortened(repr(given))}; give a text, or a list of words")


def check_made(output: Path, policy: str) -> None:
    """Check that a program has written a policy, trained from `policy`.

    Raises:
        UserError: a file is missing, the model cannot be loaded, its weights are not finite or are
            those of `policy`, or its vocabulary is another one.
    """
    _check_files(output)
    import torch

    from shiftrm.models.finite import require_finite_weights
    from shiftrm.models.sampling import load_policy
    from shiftrm.policies.loading import check_policy

    check_policy(str(output), "{output}")
    made, tokenizer = load_policy(output, dtype="auto")
    require_finite_weights(made, str(output))
    before, theirs = load_policy(policy, dtype=made.dtype)
    if tokenizer.get_vocab() != theirs.get_vocab():
        raise UserError(
            f"{output}: has another vocabulary than the policy before ({policy}), so there is no "
            "KL between them; save the policy's own tokenizer"
        )
    old, new = before.state_dict(), made.state_dict()
    same = [name for name in new if name in old and old[name].shape == new[name].shape]
    if len(same) < len(new):
        raise UserError(f"{output}: has another architecture than the policy before ({policy})")
    if all(torch.equal(old[name], new[name]) for name in same):
        raise UserError(
            f"{output}: has the weights of the policy before ({policy}), so nothing was trained; "
            "see the log, and check learning rate and number of steps"
        )


def _check_files(output: Path) -> None:
    if not output.is_dir() or output.is_symlink():
        raise UserError(
            f"{output}: the command ended well but wrote no such folder; let it save the policy "
            "at {output}"
        )
    link = next((path for path in sorted(output.rglob("*")) if path.is_symlink()), None)
    if link is not None:
        raise UserError(f"{link}: is a link; let the command write files into {{output}}")
    if (output / "adapter_config.json").is_file() and not (output / "config.json").is_file():
        raise UserError(
            f"{output}: holds an adapter alone; let the command merge it into the weights"
        )
    wanted: Sequence[tuple[str, Sequence[str]]] = (
        ("config.json", ("config.json",)),
        ("weights (*.safetensors or *.bin)", ("*.safetensors", "*.bin")),
        ("tokenizer", TOKENIZER_FILES),
    )
    for what, patterns in wanted:
        if not any(path for pattern in patterns for path in output.glob(pattern)):
            raise UserError(
                f"{output}: has no {what}; let the command save an ordinary transformers "
                "checkpoint with its tokenizer"
            )
