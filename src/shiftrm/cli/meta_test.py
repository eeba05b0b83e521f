"""`shiftrm meta-test`: optimise a policy against a frozen reward model in unseen domains."""

from dataclasses import dataclass

from shiftrm.cli.checks import output_folder
from shiftrm.cli.options import About, build, inputs, option, optional
from shiftrm.cli.progress import only_on_terminals
from shiftrm.config import apply_overrides, to_mapping

EPILOG = """examples:
  shiftrm meta-test --policy models/sft --reward models/reward --domains domains --output runs/test
  shiftrm meta-test --policy models/sft --reward models/reward --domains domains --way ppo \\
      --judge models/evaluation-reward --output runs/ppo ppo.steps=50 ppo.kl_target=6
  shiftrm meta-test --policy models/sft --domains domains --way plain --output runs/plain

Ways: weighted (fine-tuning on the domain's finetune.jsonl, weighted by exp(r/beta)), ppo (PPO with
a KL penalty on its prompts), rloo (the same by TRL's RLOO), plain (fine-tuning without a reward
model: the baseline), none (the policy is measured as it is).

Measured before and after, for every domain: A_PL on eval_pairs.jsonl, KL to the reference, the mean
reward of the guiding reward model and of the judge on responses to prompts.jsonl. In the gold world
of domains, --judge WORLD/weights.json is the gold reward.

Settings, as key=value: seed, weighted.* (updates, batch_size, learning_rate, beta, ...), ppo.*
(steps, kl_coefficient, kl_target, ...), rloo.* (steps, kl_coefficient, ...), evaluation.*
(responses_per_prompt, pairs, sampling.*).
A command that was interrupted continues when it is given again.
"""

ABOUT = About(
    help="make and measure policies for unseen domains under a frozen reward model (OODPL)",
    description="Makes a policy for every held-out domain, guided by a frozen reward model, "
    "and measures it against the reference policy.",
    epilog=EPILOG,
    again="to continue",
)


@dataclass(frozen=True, kw_only=True)
class Options:
    policy: str = option("DIR", "the policy to start from", reads=True)
    reference: str | None = optional(
        "DIR", "the policy to stay close to and to compare with", shown="--policy", reads=True
    )
    reward: str | None = optional("DIR", "reward model that guides", reads=True)
    domains: str = option("DIR", "folder of domains", reads=True)
    output: str = option("DIR", "folder of the result")
    way: str = option("WAY", "weighted, ppo, rloo, plain or none", default="weighted")
    only: list[str] | None = optional(
        "NAME,NAME", "these domains", comma=True, shown="the held-out domains"
    )
    judge: str | None = optional("DIR", "reward model that only evaluates", reads=True)
    workers: int = option("N", default=1, least=1)
    settings: list[str] = option("key=value", "any setting", default=[])


def run(options: Options) -> None:

    output = output_folder(options.output, apart_from=inputs(options))
    from shiftrm.pipeline.meta_jobs import MetaTest
    from shiftrm.pipeline.meta_test_run import MetaTestConfig, meta_test

    only_on_terminals()
    settings = apply_overrides(to_mapping(MetaTestConfig()), options.settings)
    job = build(MetaTest, options, domain="", settings=settings)
    print(meta_test(job, output, names=options.only, workers=options.workers))
