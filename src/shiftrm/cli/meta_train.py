"""`shiftrm meta-train`: train a reward model on many domains, for a domain without labels."""

from dataclasses import dataclass

from shiftrm.cli.options import About, option, optional
from shiftrm.cli.training import TrainingOptions, run_job

EPILOG = """examples:
  shiftrm meta-train --model models/sft --domains domains --output models/reward max_steps=1000
  shiftrm meta-train --config recipes/shp.yaml --domains shp --model models/sft --output models/rm
  accelerate launch -m shiftrm meta-train --config recipes/shp.yaml domains_per_step=4 ...

A domain is a folder: DIR/NAME/finetune.jsonl (prompt, response) and pairs.jsonl (prompt, chosen,
rejected), and eval_pairs.jsonl for a domain that is watched; DIR/splits.json or the options say
which domains are held out.

Settings: every field of OODPLConfig, and so of transformers.TrainingArguments, as key=value:
max_steps (K), learning_rate, inner_steps (D), inner_learning_rate, beta, normalize_weights,
curvature (exact, finite_difference, none), last_steps, support_batch_size, query_batch_size,
domains_per_step, mixture, micro_batch_size, reduction, max_length, eval_strategy, eval_steps, ...

FILE.yaml holds the same options and settings in one flat mapping; the command line wins. A command
that was interrupted continues from the last checkpoint when it is given again.
"""

ABOUT = About(
    help="meta-train a reward model over many domains (OODPL)",
    description="Meta-trains a reward model: it is changed so that a policy fine-tuned on a "
    "domain's data, weighted by its rewards, prefers what people of the domain prefer.",
    epilog=EPILOG,
    again="to continue from the last checkpoint, if there is one",
)


@dataclass(frozen=True, kw_only=True)
class Options(TrainingOptions):
    model: str = option("DIR", "reward model or policy to start from", reads=True)
    policy: str | None = optional("DIR", "reference policy", shown="--model", reads=True)
    domains: str = option("DIR", "folder with a folder for each domain", reads=True)
    held_out: list[str] | None = optional(
        "NAME,NAME", "not trained on", comma=True, shown="those of splits.json"
    )
    validation: list[str] | None = optional(
        "NAME,NAME", "watched, not trained on; held-out ones can be, too", comma=True
    )


def run(options: Options) -> None:
    run_job("MetaTrain", options)
