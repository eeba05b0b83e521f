"""`shiftrm serve`: a reward model behind HTTP, for any trainer."""

import os
from dataclasses import dataclass

from shiftrm.cli.checks import output_folder, output_rows
from shiftrm.cli.options import About, inputs, option, optional
from shiftrm.cli.progress import only_on_terminals
from shiftrm.errors import UserError

EPILOG = """examples:
  shiftrm serve --model models/reward
  shiftrm serve --model models/reward --port 9000 --max-length 2048 --log runs/serve
  SHIFTRM_TOKEN=$(openssl rand -hex 16) shiftrm serve --model models/reward --host 0.0.0.0

  curl http://127.0.0.1:8000/score -d '{"prompt": "the red", "responses": [" cat", " dog"]}'
  curl http://127.0.0.1:8000/reload -H "Authorization: Bearer $SHIFTRM_TOKEN" \\
      -d '{"model": "models/adapted"}'

OpenRLHF: --reward.remote_url http://127.0.0.1:8000/get_reward
verl: /classify (as vLLM's server) or /v1/embeddings (as SGLang's)
TRL: reward_funcs=[shiftrm.serve.client.RewardClient("http://127.0.0.1:8000", tokenizer=tokenizer)]

Rewards are those of `shiftrm score`, whatever is scored at the same time. Texts are never cut: one
that is too long gets an error. Without the environment variable SHIFTRM_TOKEN only this machine is
served, and /reload is off. If DIR is a link, a new target is loaded. Ctrl-C or SIGTERM answers the
running requests, then ends.
"""

ABOUT = About(
    help="serve a reward model over HTTP to TRL, OpenRLHF, verl or any client",
    description="Serves the rewards of a reward model over HTTP. Requests of all clients are "
    "scored together, and another model can take over without losing one.",
    epilog=EPILOG,
    again="to serve again",
)

MOST_MEGABYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class Options:
    model: str = option("DIR", "checkpoint, a link to one, or a hub name", reads=True)
    host: str = option("HOST", "address to listen at", default="127.0.0.1")
    port: int = option("N", "0 takes a free one", default=8000, least=0)
    batch_tokens: int | None = optional(
        "N",
        "tokens of a forward pass, with padding; changes speed and memory only",
        least=1,
        shown="2048 on a CPU, 8192 on a GPU",
    )
    max_length: int | None = optional(
        "N", "tokens of a prompt with its response", least=1, shown="the model's context"
    )
    max_requests: int = option("N", "requests at one time", default=1024, least=1)
    max_megabytes: float = option("N", "size of a request", default=16.0, least=0.001)
    timeout: float = option("SECONDS", "for one request", default=120.0, least=0.001)
    log: str | None = optional("DIR", "folder for progress.log: start, new models, trouble, end")
    log_requests: str | None = optional(
        "FILE", "JSONL for every request with its texts and rewards", shown="nothing is logged"
    )


def run(options: Options) -> None:
    from shiftrm.progress import current
    from shiftrm.serve.output import print_line
    from shiftrm.serve.server import require_packages, run
    from shiftrm.serve.settings import TOKEN, Settings

    require_packages()
    if not options.max_megabytes < MOST_MEGABYTES:
        raise UserError(
            f"--max-megabytes is {options.max_megabytes:g}; it must be below {MOST_MEGABYTES}"
        )
    settings = Settings(
        host=options.host,
        port=options.port,
        token=os.environ.get(TOKEN, ""),
        batch_tokens=options.batch_tokens,
        max_length=options.max_length,
        max_bytes=int(options.max_megabytes * 2**20),
        max_requests=options.max_requests,
        timeout=options.timeout,
    )
    requests_log = None
    if options.log_requests is not None:
        if options.log_requests.lower().endswith(".gz"):
            raise UserError(f"{options.log_requests}: is written as plain JSONL; leave out .gz")
        requests_log = output_rows(options.log_requests, apart_from=inputs(options))
    progress, folder = current(), None
    if options.log is not None:
        folder = output_folder(options.log, apart_from=[*inputs(options), requests_log])

    def say(line: str) -> None:
        print_line(line)
        if progress is None:
            return
        if folder is not None:  # made when there is something to say: a mistake leaves nothing
            folder.mkdir(parents=True, exist_ok=True)
        progress.log_to(folder)
        progress.note(line)

    only_on_terminals()
    run(options.model, settings, say=say, requests_log=requests_log)
