"""`shiftrm sft`: fine-tune a policy on demonstrations."""

from dataclasses import dataclass

from shiftrm.cli.options import About, option
from shiftrm.cli.training import POLICY_HELP, TrainingOptions, run_job
from shiftrm.data.sources import SOURCE_HELP

EPILOG = """examples:
  shiftrm sft --model models/base --demonstrations demonstrations.jsonl --output models/sft
  shiftrm sft --model models/base --demonstrations chats.jsonl --output models/sft \\
      chat_template_path=template.jinja learning_rate=1e-5 num_train_epochs=2 max_length=2048
  accelerate launch -m shiftrm sft --config sft.yaml --use-peft --lora-r 16

A demonstration is {"prompt", "completion"}, each text or chat messages, or {"messages"}: a whole
conversation. The loss is on completions, or on every answer of the assistant. Demonstrations longer
than max_length tokens are dropped and counted; nothing is truncated. Chats need a template: the
tokenizer's own, or chat_template_path=FILE.jinja (or the folder of a model that has one).

"""

ABOUT = About(
    help="fine-tune a policy on demonstrations",
    description="Supervised fine-tuning of a causal language model, by TRL's SFTTrainer.",
    epilog=EPILOG + POLICY_HELP.format(configs="trl.SFTConfig") + SOURCE_HELP,
    again="to continue from the last checkpoint, if there is one",
)


@dataclass(frozen=True, kw_only=True)
class Options(TrainingOptions):
    model: str = option("DIR", "checkpoint or hub name", reads=True)
    demonstrations: str = option("DATA", "what to learn", reads=True)


def run(options: Options) -> None:
    run_job("Sft", options)
