"""The job of a policy step that another program does: `policy: {method: command, ...}`."""

import os
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from shiftrm.errors import UserError
from shiftrm.models.generation import SamplingConfig
from shiftrm.models.local_server import last_lines
from shiftrm.pipeline.children import running_child
from shiftrm.pipeline.job import Input
from shiftrm.pipeline.reward_server import check_server, reward_server
from shiftrm.policies.external import Command, check_made, parse_command
from shiftrm.serve.settings import TOKEN

if TYPE_CHECKING:
    from shiftrm.pipeline.experiment import Experiment

__all__ = ["COMMAND", "External", "check_commands", "command_notes"]

COMMAND = "command"
"""The name of this way to optimise a policy."""

LOG, SERVER_LOG = "command.log", "reward_server.log"
WORK = "command"

COMBINED = ("mean", "min", "variance", "laplace")
"""Combinations of reward models (`Method.combine`) that are no ordinary checkpoint."""


@dataclass(frozen=True)
class External:
    """Train a policy by a command; see `policies.external`.

    The command's output goes to `command.log`, the reward server's to `reward_server.log`, beside
    the result.

    Attributes:
        words: the command, with places.
        reference, reward, prompts, pairs: None where the command has no place for them.
        round: number of the round.
        processes, reward_host, reward_devices: as in `launch.Execution`.
    """

    several: ClassVar[bool] = False
    makes: ClassVar[str] = "model"

    words: tuple[str, ...]
    policy: Input
    reference: Input | None = None
    reward: Input | None = None
    prompts: Input | None = None
    pairs: Input | None = None
    round: int = 1
    seed: int = 0
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    processes: int = 1
    reward_host: str = "127.0.0.1"
    reward_devices: str = ""

    @classmethod
    def of(cls, words: Any, inputs: Mapping[str, Input], **options: Any) -> "External":
        """Return the job with those of the inputs that the command uses."""
        command = parse_command(words)
        used = {"reward" if name == "reward_url" else name for name in command.places}
        used |= {"prompts"} if "prompts_folder" in used else set()
        given: dict[str, Any] = {name: value for name, value in inputs.items() if name in used}
        return cls(command.all_words, **given, **options)

    @property
    def line(self) -> Command:
        return parse_command(self.words)

    def check(self) -> None:
        """Check, before the run starts, that the program and a reward server can be started."""
        self.line.check_program()
        if "reward_url" in self.line.places:
            check_server(self.reward_host)

    def on_machine(self, way: Mapping[str, Any]) -> "External":
        return replace(self, **way)

    def command(self, output: str) -> list[str]:
        """Return the words of the command line."""
        shown = {"reward_url": "http://HOST:PORT", "checkpoints": "CHECKPOINTS"}
        shown |= {"prompts_folder": "FOLDER"}
        return list(self.line.filled(self._values(output) | shown).all_words)

    def run(self, output: Path) -> str:
        """Run the command, check what it made, and move it to `output`.

        Raises:
            UserError: the command or the reward server cannot be started or fails, or the result is
                not a policy. The log stays, and so do the command's checkpoints.
        """
        work, log = output.parent / WORK, output.parent / LOG
        made, checkpoints = (work / name for name in ("output", "checkpoints"))
        if made.is_symlink() or made.is_file():
            made.unlink()
        shutil.rmtree(made, ignore_errors=True)  # of a call that failed or was interrupted
        checkpoints.mkdir(parents=True, exist_ok=True)
        values = self._values(str(made)) | {"checkpoints": os.path.abspath(checkpoints)}
        if "prompts_folder" in self.line.places:
            values["prompts_folder"] = _folder_of(str(self.prompts), work / "prompts")
        with self._address(output.parent / SERVER_LOG) as address:
            _run(self.line.filled(values | {"reward_url": address}), log)
        check_made(made, str(self.policy))
        for path in work.iterdir():  # before the result is in place: then nothing is done again
            if path != made:
                linked = path.is_symlink() or not path.is_dir()
                path.unlink() if linked else shutil.rmtree(path)
        made.rename(output)
        work.rmdir()
        return f"policy of the command: {output}"

    @contextmanager
    def _address(self, log: Path) -> Iterator[str]:
        if "reward_url" not in self.line.places:
            yield ""
            return
        options = {"host": self.reward_host, "devices": self.reward_devices}
        with reward_server(str(self.reward), log=log, **options) as address:
            yield address

    def _values(self, output: str) -> dict[str, Any]:
        """Return what stands in the places, but for those that exist only while it runs."""
        named = ("policy", "reference", "reward", "prompts", "pairs")
        found = {name: _absolute(str(getattr(self, name))) for name in named}
        return {
            **found,
            "output": os.path.abspath(output) if os.path.isdir(Path(output).parent) else output,
            "seed": self.seed,
            "round": self.round,
            "max_new_tokens": self.sampling.max_new_tokens,
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "processes": self.processes,
            "python": sys.executable,
        }


def _absolute(path: str) -> str:
    """Return a path for programs that run elsewhere; a hub name as it is."""
    return os.path.abspath(path) if os.path.exists(path) else path


def _folder_of(prompts: str, folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    shutil.copyfile(prompts, folder / "train.jsonl")
    return os.path.abspath(folder)


def _run(command: Command, log: Path) -> None:
    """Run a command with its output in a log.

    Raises:
        UserError: it cannot be started, or fails.
    """
    shown = shlex.join(command.all_words)
    if token := os.environ.get(TOKEN):
        shown = shown.replace(token, "TOKEN")
    print(f"$ {shown}\nits output: {log}", flush=True)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **dict(command.environment)}
    with open(log, "ab") as output:
        output.write(f"$ {shown}\n".encode())
        output.flush()
        try:
            with running_child(command.words, env=environment, output=output) as process:
                status = process.wait()
        except OSError as error:
            raise UserError(
                f"{command.words[0]}: cannot be started ({error.strerror}); check policy.command"
            ) from None
    if status:
        how = f"ended with status {status}"
        if status < 0:
            how = f"was ended by {signal.Signals(-status).name}"
        raise UserError(
            f"policy.command {how}: {last_lines(log, 3)}; its log is {log}; the same command "
            "continues the run with this step"
        )


def check_commands(recipe: "Experiment") -> None:
    """Check that a recipe's command and the arms that use it fit together.

    Raises:
        UserError: names the setting.
    """
    section = recipe.policy
    users = [name for name in recipe.methods if recipe.optimiser_of(name) == COMMAND]
    if section.command is None:
        if users or section.method == COMMAND:
            raise UserError(
                "policy.command is missing; give the command of the trainer, such as "
                "'train.sh {policy} {reward_url} {prompts} {output}'"
            )
        return
    if not users or recipe.domains is not None:
        raise UserError(
            "policy.command: no arm uses it; set policy.method=command, or leave it out"
        )
    if section.method == COMMAND and section.settings:
        raise UserError("policy.settings: a command takes none; write them into policy.command")
    places = parse_command(section.command).places
    for name in users:
        arm = recipe.methods[name]
        if arm.policy_settings:
            raise UserError(f"methods.{name}.policy_settings: a command takes none; leave them out")
        if "gold" in arm.method.needs and places & {"reward", "reward_url"}:
            raise UserError(
                f"methods.{name}.reward is {arm.reward!r}: no folder holds the gold world's "
                "reward, so policy.command cannot use it; leave the arm out, or give it policy=ppo"
            )
        if arm.method.combine in COMBINED and "reward" in places:
            raise UserError(
                f"methods.{name}.reward is {arm.reward!r}, which is no single checkpoint, so a "
                "trainer cannot load {reward}; use {reward_url}, whose server combines the rewards"
            )


def command_notes(recipe: "Experiment") -> list[str]:
    """Return a line for each setting that a recipe's command does not see."""
    if recipe.policy.command is None:
        return []
    found = []
    if not parse_command(recipe.policy.command).places & {"reward", "reward_url"}:
        found.append(
            "note: policy.command has neither {reward} nor {reward_url}, so the reward models of "
            "the arms do not change what it trains"
        )
    if recipe.lora is not None:
        found.append("note: lora is not for policy.command, which takes its trainer's own options")
    return found
