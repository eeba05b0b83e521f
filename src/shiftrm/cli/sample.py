"""`shiftrm sample`: sample K responses per prompt from a policy into a group file."""

import shlex
from dataclasses import dataclass

from shiftrm.cli.checks import output_rows
from shiftrm.cli.options import About, build, inputs, option, optional
from shiftrm.cli.progress import bar, only_on_terminals
from shiftrm.data.sources import SOURCE_HELP
from shiftrm.errors import UserError

EPILOG = """examples:
  shiftrm sample --policy models/ppo-round-1 --prompts prompts.jsonl --output groups.jsonl
  shiftrm sample --policy models/ppo-round-1 --prompts prompts.jsonl --output groups.jsonl \\
      --responses 5 --temperature 0.8 --top-p 0.9 --repetition-penalty 1.1
  shiftrm sample --policy models/ppo-round-1 --prompts prompts.jsonl --output groups.jsonl --vllm
  shiftrm sample --policy models/ppo-round-1 --prompts prompts.jsonl --output groups.jsonl \\
      --server http://localhost:8000/v1 --served-model policy

Each row of the prompts holds {"prompt": "text"} or {"prompt": [chat messages]}; a chat that ends
with the assistant's words is continued. Each line of the output holds {"prompt", "responses",
"finished", "prompt_ids", "response_ids", "tokenizer"}: the text for people, and the tokens that
were sampled. A group for `shiftrm adapt` needs at least two responses. A response ends with the
tokenizer's EOS, the end tokens of the policy's generation config, or the token with which the chat
template closes a turn. An interrupted command continues when repeated.
With vLLM the tokenizer of --policy makes and reads the tokens, and the server only continues them;
a server that needs a key gets that of the environment variable VLLM_API_KEY.
"""

ABOUT = About(
    help="sample K responses per prompt from a policy",
    description="Samples several responses to each prompt from a causal language model and "
    "writes them as groups, which `shiftrm train --groups` adapts a reward model to.",
    epilog=EPILOG + SOURCE_HELP,
    again="to continue",
)

VLLM = "sampling by vLLM"


@dataclass(frozen=True, kw_only=True)
class Options:
    policy: str = option("DIR", "checkpoint or hub name", reads=True)
    prompts: str = option("DATA", "rows with `prompt`", reads=True)
    output: str = option("FILE", "group file to write")
    responses: int = option("K", "responses to each prompt", default=5, least=1)
    max_new_tokens: int = option("N", "maximum response length, in tokens", default=128)
    temperature: float = option("T", "sampling temperature; 0: greedy", default=1.0)
    top_p: float = option("P", "share of probability to sample from", default=1.0)
    repetition_penalty: float = option("X", "above 1, repeated tokens are less likely", default=1.0)
    batch_size: int = option(
        "N", "prompts in a batch; with vLLM, prompts in progress at one time", default=32, least=1
    )
    seed: int = option("N", default=0)
    server: str | None = optional("URL", "a running server, up to and including /v1", group=VLLM)
    vllm: bool = option(
        help="start `vllm serve` for the policy, and end it afterwards", default=False, group=VLLM
    )
    served_model: str | None = optional(
        "NAME", "what --server calls the policy, if not --policy", group=VLLM
    )
    vllm_arguments: str | None = optional(
        "WORDS",
        'further options of vllm serve, as --vllm-arguments="--tensor-parallel-size 2"',
        group=VLLM,
    )

    def __post_init__(self) -> None:
        if self.server and self.vllm:
            raise UserError("--server and --vllm exclude each other; give one of them")
        if self.served_model and not self.server:
            raise UserError("--served-model needs --server; give its address")
        if self.vllm_arguments and not self.vllm:
            raise UserError("--vllm-arguments needs --vllm; add it")

    def server_arguments(self) -> tuple[str, ...]:
        """Return the words of --vllm-arguments."""
        try:
            return tuple(shlex.split(self.vllm_arguments or ""))
        except ValueError as error:
            raise UserError(f"--vllm-arguments: {self.vllm_arguments!r}: {error}") from None


def run(options: Options) -> None:
    from shiftrm.models.sampling import SamplingConfig
    from shiftrm.pipeline.jobs import Sample

    job = build(
        Sample,
        options,
        sampling=build(SamplingConfig, options),
        vllm_arguments=options.server_arguments(),
    )
    output = output_rows(
        options.output,
        apart_from=inputs(options),
        beside=["{name}.partial", "{name}.vllm.log"],
        may_exist=True,  # with the same groups; the job checks that
    )
    only_on_terminals()
    print(job.run(output, bar=bar))
