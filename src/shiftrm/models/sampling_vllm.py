"""Sample K responses per prompt from a vLLM server, with the rows and files of `sampling`.

Prompts and responses travel as token ids, so that only `rendering` converts between text and
tokens. Source of the request: vLLM's OpenAI-compatible server, "Extra parameters" of the
completions API, and `CompletionRequest` in vLLM's source.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from shiftrm.concurrency import map_bounded
from shiftrm.errors import UserError, suggest
from shiftrm.files import Row, encodable
from shiftrm.models.endpoint import Endpoint, EndpointConfig
from shiftrm.models.endpoint_format import Completion
from shiftrm.models.loading import checkpoint_fingerprint
from shiftrm.models.rendering import Text, pin_template, stop_token_ids
from shiftrm.models.responses import IDS, PROMPT_IDS, TOKENIZER
from shiftrm.models.sampling import (
    Draws,
    Sample,
    Sampler,
    SamplingConfig,
    cut_at_stop,
    draw_seed,
    group_row,
)

KEY_VARIABLE = "VLLM_API_KEY"  # vLLM's name for its server's key
TIMEOUT = 600.0  # seconds: one of many concurrent requests may wait that long


@dataclass(frozen=True)
class VllmServer:
    """A running server and the model to request from it.

    Attributes:
        served: the server's name of the model, if it was asked for by that.
        max_model_len: maximum tokens of prompt and response together; None if not reported.
        generation_config: the policy's own, which may list more stop tokens.
    """

    endpoint: Endpoint
    model: str
    max_model_len: int | None = None
    generation_config: Any = None
    served: str | None = None

    @property
    def config(self) -> Any:
        """The model configuration in which `sampling.encode_prompts` looks for the limit."""
        return SimpleNamespace(max_position_embeddings=self.max_model_len)


def connect(url: str, model: str, *, served: str | None = None) -> VllmServer:
    """Find a model on a running server.

    Args:
        url: up to and including `/v1`.
        model: folder or hub name of the policy; selects the server's model with this name or made
            from this folder.
        served: the server's name of the model, if different.

    Raises:
        UserError: no server responds, or it has no such model; the message names its models.
    """
    endpoint = Endpoint(EndpointConfig(url, key_variable=KEY_VARIABLE, timeout=TIMEOUT))
    cards = endpoint.model_cards()
    wanted = served or model
    found = [card for card in cards if card["id"] == wanted] or [
        card for card in cards if served is None and card.get("root") == model
    ]
    if not found:
        names = endpoint.models()
        near = suggest(wanted, names) if names else ""
        raise UserError(
            f"{url}: serves {', '.join(map(repr, names)) or 'no model'}, not {wanted!r}"
            + (near if near.startswith("; did") else "")
            + "; start vLLM with this policy, or give its name there as --served-model"
        )
    limit = found[0].get("max_model_len")
    limit = limit if isinstance(limit, int) else None
    return VllmServer(endpoint, found[0]["id"], limit, _generation_config(model), served)


def _generation_config(path: str) -> Any:
    """Return a policy's generation config; None if not available."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(path)
    except (OSError, ValueError):
        return None


def load_tokenizer(path: str | Path) -> Any:
    """Load a policy's tokenizer without its weights.

    Raises:
        UserError: there is no tokenizer, or it has no EOS token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: its tokenizer cannot be loaded ({str(error).splitlines()[0]})"
        ) from None
    stop_token_ids(tokenizer)
    pin_template(tokenizer)
    return tokenizer


def policy_limits(path: str | Path, served: str | None = None) -> Any:
    """Return what `encode_prompts` and `Sampler.holds` need of the policy, without its weights, so
    that lengths and the output are checked before a server is started.

    Raises:
        UserError: there is no model configuration.
    """
    from transformers import AutoConfig

    try:
        return SimpleNamespace(config=AutoConfig.from_pretrained(str(path)), served=served)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a model folder ({str(error).splitlines()[0]})") from None


class ServerSampler(Sampler):
    """Draws with a `VllmServer` as the model."""

    def batches(
        self, prompts: Sequence[Text], encoded: Sequence[list[int]], draws: Draws, first: int
    ) -> Iterator[list[Row]]:
        stop = stop_token_ids(self.tokenizer, self.model.generation_config)
        K = draws.num_responses
        same = K if draws.config.temperature == 0 else 1  # vLLM draws only one greedy response

        def ask(index: int) -> Row:
            parameters = completion_parameters(
                draws.config,
                num_responses=K // same,
                stop=stop,
                seed=draw_seed(draws.seed, index),  # vLLM gives the k-th response the seed plus k
            )
            answers = self.model.endpoint.complete(self.model.model, encoded[index], **parameters)
            _check_answers(self.model, answers, K // same)
            answers = [answer for answer in answers for _ in range(same)]
            return _row(self.tokenizer, prompts[index], encoded[index], answers, stop)

        early: dict[int, Row] = {}
        following = first
        places = range(first, len(prompts))
        for offset, row in map_bounded(ask, places, concurrency=draws.batch_size):
            early[first + offset] = row
            while following in early:
                yield [early.pop(following)]
                following += 1

    def batch_size(self, draws: Draws) -> int:
        return 1

    def settings(self, draws: Draws) -> list[Any]:
        """Return the settings; of what a server calls `--served-model` only the name is known."""
        name = self.tokenizer.name_or_path or "unknown"
        policy = [checkpoint_fingerprint(name) or name, self.model.served]
        return ["vllm", policy, asdict(draws.config), draws.num_responses, draws.seed]


def sample_rows_vllm(
    server: VllmServer, tokenizer: Any, prompts: Sequence[Text], draws: Draws
) -> list[Row]:
    """Do `sampling.sample_rows` with a server.

    The seed and a prompt's position decide its draws, as far as vLLM's kernels are deterministic
    (another summation order in a larger batch can change a close draw). The batch size does not.

    Args:
        tokenizer: the policy's own.

    Raises:
        UserError: as `sampling.sample_rows`; or the server fails, or does not answer as vLLM does.
    """
    return ServerSampler(server, tokenizer).rows(prompts, draws)


def sample_groups_vllm(
    server: VllmServer,
    tokenizer: Any,
    prompts: Sequence[Text],
    path: str | Path,
    draws: Draws,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Do `sampling.sample_groups` with a server: write the rows of `sample_rows_vllm`.

    Rows are written in the order of the prompts, so an interrupted call continues after the last
    row.

    Raises:
        UserError: as `sampling.sample_groups` and `sample_rows_vllm`.
    """
    return ServerSampler(server, tokenizer).write(prompts, path, draws, progress)


def completion_parameters(
    config: SamplingConfig, *, num_responses: int, stop: Sequence[int], seed: int
) -> dict[str, Any]:
    """Return the request's parameters besides model and prompt.

    vLLM takes missing parameters (sampling defaults, more stop tokens) from the model's generation
    config. All are therefore set here: the draw ends where `sampling.generate` ends it, and only
    `config` determines the distribution.

    Args:
        stop: the ids of `rendering.stop_token_ids`.
    """
    return {
        "n": num_responses,
        "max_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "repetition_penalty": config.repetition_penalty,
        "top_k": -1,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "ignore_eos": True,
        "stop_token_ids": list(stop),
        "seed": seed,
        "skip_special_tokens": False,
        "return_token_ids": True,
    }


def _check_answers(server: VllmServer, answers: Sequence[Completion], expected: int) -> None:
    """Check the number of answers and how each of them ended."""
    if len(answers) != expected:
        raise UserError(
            f"{server.endpoint.base_url}: sent {len(answers)} responses for {expected}; "
            "give the address of a vLLM server"
        )
    for answer in answers:
        if answer.finish_reason not in ("stop", "length"):
            raise UserError(
                f"{server.endpoint.base_url}: a response ended with {answer.finish_reason!r}, "
                "neither by itself nor at its length; look at the server's log"
            )


def _row(
    tokenizer: Any,
    prompt: Text,
    prompt_ids: list[int],
    answers: Sequence[Completion],
    stop: Sequence[int],
) -> Row:
    """Return the row of one prompt.

    If the server does not send token ids (vLLM before 0.10.2), the row has its text and no tokens.
    """
    samples = [
        Sample(prompt_ids, *cut_at_stop(list(answer.token_ids or ()), stop)) for answer in answers
    ]
    row = group_row(tokenizer, prompt, samples)
    for place, answer in enumerate(answers):
        if answer.token_ids is None:
            row["responses"][place] = encodable(answer.text)
            row["finished"][place] = answer.finish_reason == "stop"
    if any(answer.token_ids is None for answer in answers):
        for column in (PROMPT_IDS, IDS, TOKENIZER):
            del row[column]
    return row
