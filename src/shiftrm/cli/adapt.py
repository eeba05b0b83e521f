"""`shiftrm adapt`: adapt a reward model to the current policy, and diagnose both."""

from dataclasses import dataclass, fields
from typing import Any

from shiftrm.cli.diagnose import show_tables
from shiftrm.cli.options import About, build, command_line, option, optional
from shiftrm.cli.progress import bar, only_on_terminals
from shiftrm.cli.training import REWARD_HELP, RewardOptions, methods_help, result_folder
from shiftrm.data.sources import SOURCE_HELP
from shiftrm.errors import UserError

EPILOG = """examples:
  shiftrm adapt --model models/reward --pairs pairs.jsonl --groups groups.jsonl \\
      --eval-pairs heldout.jsonl --method contrast_all contrast_share=0.75 --output models/reward-2
  shiftrm adapt --model models/reward --pairs pairs.jsonl --policy models/ppo-1 \\
      --prompts prompts.jsonl --responses 5 --temperature 0.8 --method contrast \\
      --output models/reward-2
  shiftrm adapt --model models/reward --pairs pairs.jsonl --groups groups.jsonl \\
      --eval-pairs heldout.jsonl --output models/reward-2 preset=by_effect learning_rate=5e-6
  shiftrm adapt --config adapt.yaml --eval-groups other=groups-of-other-prompts.jsonl

This runs `shiftrm train --method`, starting from a trained reward model, and the diagnosis of
`shiftrm diagnose` before and after. The diagnosis uses data that the training has not seen:
--eval-pairs, and a share of the prompts of the groups, unless --eval-groups gives others. Only
labels can show that the model became sharper, so give --eval-pairs, preferably of the current
policy. The output folder holds the model, before_after.html, before_after.json, the groups held out
and those sampled.

"""

FILES = """
FILE.yaml holds the same options and settings in one flat mapping; the command line wins.

Samples and checkpoints are written into .NAME.work beside the output. A command that was
interrupted, killed or stopped by a full disk continues from there when it is given again.
"""

ABOUT = About(
    help="adapt a reward model to responses of the current policy; before and after",
    description="Adapts a trained reward model to unlabelled responses of the current policy "
    "(by --method), and says whether it became sharper or only louder.",
    epilog=EPILOG + methods_help() + REWARD_HELP + FILES + SOURCE_HELP,
    again="to continue: samples and checkpoints are kept",
)

SAMPLING = "sampling, with --policy"


@dataclass(frozen=True, kw_only=True)
class Options(RewardOptions):
    method: str = option(
        "NAME",
        "one of the methods below, or package.module:attribute",
        default="metarm",
    )
    groups: str | None = optional("DATA", "response groups of the current policy", reads=True)
    policy: str | None = optional(
        "DIR",
        "instead of --groups: the policy to sample them from; also today's policy, for methods "
        "that use it",
        reads=True,
    )
    reference: str | None = optional("DIR", "the SFT policy, for methods that use it", reads=True)
    prompts: str | None = optional("DATA", "with --policy: rows with `prompt`", reads=True)
    holdout: float | None = optional(
        "SHARE",
        "share of the groups' prompts that is only measured on",
        shown="0.2",
    )
    eval_groups: dict[str, str] = option(
        "[NAME=]DATA",
        "other groups to measure on, so that none are held out; may be repeated",
        default={},
        reads=True,
    )
    sight_pairs: int = option(
        "N",
        "pairs of each sight test before and after (see `shiftrm diagnose`); 0: no tests",
        default=500,
        least=0,
    )
    responses: int | None = optional("K", "responses to each prompt", shown="5", group=SAMPLING)
    max_new_tokens: int | None = optional(
        "N", "maximum response length, in tokens", shown="128", group=SAMPLING
    )
    temperature: float | None = optional("T", "sampling temperature", shown="1", group=SAMPLING)
    top_p: float | None = optional(
        "P", "share of probability to sample from", shown="1", group=SAMPLING
    )
    repetition_penalty: float | None = optional(
        "X", "above 1, repeated tokens are less likely", shown="1", group=SAMPLING
    )
    sampling_batch_size: int | None = optional(
        "N", "prompts in a batch", shown="32", group=SAMPLING
    )

    def __post_init__(self) -> None:
        if self.policy is not None and self.prompts is None and self.groups is None:
            raise UserError("--policy without --prompts: give the prompts to answer")
        if self.prompts is not None and self.policy is None:
            raise UserError("--prompts without --policy: give the policy to answer them")
        missing = "--policy" if self.policy is None else "--prompts"
        for each in fields(self) if self.prompts is None else ():
            if each.metadata.get("group") == SAMPLING and getattr(self, each.name) is not None:
                flag = f"--{each.name.replace('_', '-')}"
                raise UserError(f"{flag} needs {missing}, which is missing")


def run(options: Options) -> None:
    output = result_folder(options)  # before the slow imports
    from shiftrm.methods.adapt import Request, adapt
    from shiftrm.methods.inputs import policy_note
    from shiftrm.report.adaptation import PAGE, write_before_after

    only_on_terminals()
    request = build(
        Request, options, output=output, samples=_samples(options), command=command_line()
    )
    found = adapt(request, present=write_before_after, bar=bar)
    if found is not None:
        show_tables(found.findings)
        print(f"{found.summary}\nPage: {output / PAGE}")
        if note := policy_note(options.method):
            print(note)


def _samples(options: Options) -> Any:
    from shiftrm.methods.adapt import PolicySamples
    from shiftrm.models.sampling import SamplingConfig

    if options.prompts is None:
        return None
    return build(
        PolicySamples,
        options,
        config=build(SamplingConfig, options),
        batch_size=options.sampling_batch_size,
    )
