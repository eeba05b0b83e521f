"""`shiftrm train`: train a reward model on preference pairs, with MetaRM if groups are given."""

from dataclasses import dataclass

from shiftrm.cli.options import About, optional
from shiftrm.cli.training import REWARD_HELP, RewardOptions, methods_help, run_job
from shiftrm.data.sources import SOURCE_HELP

EPILOG = """examples:
  shiftrm train --model models/sft --pairs pairs.jsonl --output models/reward
  shiftrm train --model models/sft --pairs pairs.jsonl --groups groups.jsonl \\
      --output models/reward-round-2 preset=by_effect learning_rate=5e-6 num_train_epochs=1
  shiftrm train --config reward.yaml --learning-rate 1e-5 --eval-pairs chat=chat.csv
  accelerate launch -m shiftrm train --config reward.yaml

"""

FILES = """
FILE.yaml holds the same options and settings in one flat mapping; the command line wins:
  model: models/sft
  pairs: pairs.jsonl
  eval_pairs: {chat: chat.csv, summaries: owner/name::test}
  learning_rate: 5e-6

Checkpoints are written into .NAME.work beside the output, as save_strategy and save_steps say. A
command that was interrupted, killed or stopped by a full disk continues from the last one when it
is given again. With LoRA the output is the merged model, and its folder adapter holds the adapter.
"""

ABOUT = About(
    help="train a reward model on preference pairs, and adapt it to unlabelled responses",
    description="Trains a reward model. With --groups, unlabelled responses of the current policy, "
    "it takes a MetaRM step in every optimizer step; without, it is plain Bradley-Terry training.",
    epilog=EPILOG + methods_help() + REWARD_HELP + FILES + SOURCE_HELP,
    again="to continue from the last checkpoint, if there is one",
)


@dataclass(frozen=True, kw_only=True)
class Options(RewardOptions):
    groups: str | None = optional("DATA", "response groups of the policy", reads=True)
    method: str | None = optional(
        "NAME",
        "one of the methods below, or package.module:attribute; default: metarm with --groups, "
        "and plain Bradley-Terry training without",
    )
    policy: str | None = optional("DIR", "today's policy, for methods that use it", reads=True)
    reference: str | None = optional("DIR", "the SFT policy, for the same methods", reads=True)
    reward: str | None = optional(
        "DIR", "the last round's reward model, for methods that use it", reads=True
    )


def run(options: Options) -> None:
    from shiftrm.methods.inputs import policy_note

    note = None if options.method is None else policy_note(options.method)
    run_job("TrainReward", options, note=note, adaptation=options.method)
