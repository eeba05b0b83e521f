"""Write the gold world as the ordinary files of a run, and label preference pairs in it."""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from shiftrm.errors import UserError
from shiftrm.files import Row, atomic_write_text, write_jsonl
from shiftrm.world.gold import WORLD, gold_reward
from shiftrm.world.world import DEFAULT_WORLD, WORLDS, World, gold_name

BASE_MODEL = "base_model"
SFT = "sft.jsonl"
PROMPTS_TRAIN = "prompts_train.jsonl"
PROMPTS_EVAL = "prompts_eval.jsonl"
README = "README.txt"


MOST_LAYERS = 1000
"""Every layer is made, so that many more would take hours."""


@dataclass(frozen=True)
class WorldConfig:
    """Everything that determines the files of a world.

    Attributes:
        kind: the world, by its name in `world.WORLDS` or as `package.module:attribute`.

    Raises:
        UserError: on construction, if a value has the wrong type or is out of range, or there is no
            such world.
    """

    seed: int = 0
    sft_examples: int = 25_600
    train_prompts: int = 2_048
    eval_prompts: int = 400
    hidden_size: int = 64
    layers: int = 2
    heads: int = 4
    intermediate_size: int = 192
    max_positions: int = 64
    kind: str = DEFAULT_WORLD

    def __post_init__(self) -> None:
        world = self.world
        for field in fields(self):
            if field.name == "kind":
                continue
            value, least = getattr(self, field.name), 0 if field.name == "seed" else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UserError(
                    f"world configuration: {field.name} is {value!r}; "
                    f"give a whole number of at least {least}"
                )
        if self.layers > MOST_LAYERS:
            raise UserError(
                f"world configuration: layers is {self.layers}; give at most {MOST_LAYERS}"
            )
        # Rotary position embeddings rotate pairs of dimensions of a head.
        if self.hidden_size % (2 * self.heads):
            raise UserError(
                f"world configuration: hidden_size {self.hidden_size} with {self.heads} heads; "
                "hidden_size must be a multiple of twice the heads"
            )
        longest = world.prompt_tokens + world.max_response_tokens
        if self.max_positions < longest + 1:
            raise UserError(
                f"world configuration: max_positions is {self.max_positions}; prompt, response "
                f"and EOS take up to {longest + 1} tokens, so give at least {longest + 1}"
            )

    @property
    def world(self) -> World:
        """Return the world."""
        if not isinstance(self.kind, str):
            raise UserError(f"world configuration: kind is {self.kind!r}; give a world's name")
        return WORLDS.get(self.kind)

    @property
    def gold(self) -> str:
        """Return the name of the world's gold reward, for `--reward` and `--watch`."""
        return gold_name(self.kind)

    def plain(self) -> dict[str, Any]:
        """Return the fields as plain data, without the default kind.

        So runs of the default world that began before there was another can go on.
        """
        own = {field.name: getattr(self, field.name) for field in fields(WorldConfig)}
        return {name: own[name] for name in own if name != "kind" or self.kind != DEFAULT_WORLD}


def write_world(directory: str | Path, config: WorldConfig) -> Path:
    """Write a world's files and return its folder; the same configuration gives the same files.

    - `base_model/`: tokenizer and a tiny Llama with random weights (safetensors), untrained;
    - `sft.jsonl`: `{prompt, completion, domain}`, demonstrations of quality uniform in [0, 1];
    - `prompts_train.jsonl`, `prompts_eval.jsonl`: `{prompt, domain}`;
    - `README.txt`: what the folder holds.

    There are only 48 different prompts in our worlds. Both prompt files are independent draws with
    repetition from them, so the evaluation prompts are **not** unseen: evaluation holds out
    responses, not prompts. There are two files because real runs have two.

    Raises:
        UserError: one of these files already exists.
    """
    directory = Path(directory)
    make_room(directory, (BASE_MODEL, SFT, PROMPTS_TRAIN, PROMPTS_EVAL, README))
    write_base_model(directory / BASE_MODEL, config)
    # Every file has its own random stream: changing the size of one does not change the others.
    world, rng = config.world, _stream(config, SFT)
    write_jsonl(directory / SFT, _sft_rows(world, rng, config.sft_examples))
    for name, count in (
        (PROMPTS_TRAIN, config.train_prompts),
        (PROMPTS_EVAL, config.eval_prompts),
    ):
        write_jsonl(directory / name, _prompt_rows(world, _stream(config, name), count))
    atomic_write_text(directory / README, _readme(config))  # last, since it marks a complete world
    return directory


def _stream(config: WorldConfig, name: str) -> random.Random:
    return random.Random(f"{config.seed}/{name}")


def _sft_rows(world: World, rng: random.Random, count: int) -> Iterator[Row]:
    for _ in range(count):
        prompt = world.draw_prompt(rng)
        completion = world.demonstration(rng, prompt, rng.random())
        yield {"prompt": prompt, "completion": completion, "domain": world.domain_of(prompt)}


def _prompt_rows(world: World, rng: random.Random, count: int) -> Iterator[Row]:
    for _ in range(count):
        prompt = world.draw_prompt(rng)
        yield {"prompt": prompt, "domain": world.domain_of(prompt)}


def make_room(directory: Path, names: Sequence[str]) -> None:
    """Create the folder of a world, if it does not contain any of these names.

    Raises:
        UserError: it contains one of them.
    """
    for name in names:
        if (directory / name).exists():
            raise UserError(
                f"{directory / name}: already exists; choose an empty folder for the world"
            )
    directory.mkdir(parents=True, exist_ok=True)


def base_model_config(config: WorldConfig, tokenizer: Any) -> Any:
    """Return the `LlamaConfig` of the world's base model."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        max_position_embeddings=config.max_positions,
        tie_word_embeddings=True,
        bos_token_id=None,  # the tokenizer has none
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def write_base_model(directory: Path, config: WorldConfig) -> None:
    """Write the tokenizer and an untrained Llama of the configured size and seed."""
    import torch
    from transformers import GenerationConfig, LlamaForCausalLM

    tokenizer = config.world.tokenizer(model_max_length=config.max_positions)
    llama = base_model_config(config, tokenizer)
    with torch.random.fork_rng(devices=[]):  # keeps the caller's random state
        torch.manual_seed(config.seed)
        model = LlamaForCausalLM(llama)
    # generate() without further arguments samples from the unmodified distribution.
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=config.world.max_response_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _readme(config: WorldConfig) -> str:
    settings = "\n".join(f"  {name} = {value}" for name, value in config.plain().items())
    count = len(config.world.prompts)
    reward = f"No file here holds the gold\nreward; its name is {config.gold}."
    if config.kind == DEFAULT_WORLD:
        reward = "The gold reward is shiftrm.world.gold.gold_reward; no\nfile here holds it."
    return f"""\
A gold world, written by shiftrm (shiftrm.world.build.write_world).

{BASE_MODEL + "/":<22}a tiny Llama with random weights and its word-level tokenizer; load both with
                      transformers. No BOS token; EOS ends a response and is not in the text.
{SFT:<22}demonstrations of mixed quality: prompt, completion, domain (TRL format)
{PROMPTS_TRAIN:<22}prompts to train on: prompt, domain
{PROMPTS_EVAL:<22}prompts to evaluate on: prompt, domain

A completion starts with a space, so that prompt + completion is the whole text. The language has
only {count} different prompts; both prompt files are draws from them with repetition, so the
evaluation prompts also occur in training. {reward}

Made with:
{settings}
"""


def label_pairs(
    prompts: Sequence[str],
    first: Sequence[str],
    second: Sequence[str],
    *,
    seed: int,
    finished: Sequence[tuple[bool, bool]] | None = None,
    reward: Callable[..., float] = gold_reward,
    domain: str | Callable[[str], str] = WORLD.domain_of,
) -> list[Row]:
    """Label pairs of responses with Bradley-Terry draws from the gold reward, as a noisy judge.

    `P(first is chosen) = sigmoid(gold(first) - gold(second))`.

    Args:
        prompts, first, second: one prompt and two responses per pair.
        seed: seed of the draws; pair i always gets the i-th draw.
        finished: whether the first and the second response of each pair ended by itself; None
            means all. The gold reward uses it, and the rows contain it.
        reward: the gold reward, with the signature of `gold_reward`.
        domain: the rows' domain, or what reads it from a prompt.

    Returns:
        TRL preference rows `{prompt, chosen, rejected, chosen_finished, rejected_finished,
        domain}` in the order of the pairs; the two flags are what `RewardTrainer` reads. Pairs of
        equal texts or with an empty one are omitted: `len(prompts) - len(rows)` of them.

    Raises:
        ValueError: sequences of different lengths.
        UserError: a text that is not a prompt of the language.
    """
    rng = random.Random(seed)
    ended = [(True, True)] * len(prompts) if finished is None else finished
    rows: list[Row] = []
    for prompt, a, b, (a_ended, b_ended) in zip(prompts, first, second, ended, strict=True):
        difference = reward(prompt, a, finished=bool(a_ended)) - reward(
            prompt, b, finished=bool(b_ended)
        )
        draw = rng.random()  # also for omitted pairs, so that they do not shift the others
        if a == b or not a.strip() or not b.strip():
            continue
        sides = ((a, bool(a_ended)), (b, bool(b_ended)))
        chosen, rejected = sides if draw < _sigmoid(difference) else sides[::-1]
        rows.append(
            {
                "prompt": prompt,
                "chosen": chosen[0],
                "rejected": rejected[0],
                "chosen_finished": chosen[1],
                "rejected_finished": rejected[1],
                "domain": domain if isinstance(domain, str) else domain(prompt),
            }
        )
    return rows


def _sigmoid(x: float) -> float:
    """Return 1 / (1 + exp(-x)) without overflow."""
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))
