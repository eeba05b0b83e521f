"""A byte-level tokenizer, which reads any text, with whatever special tokens and template."""

import re
from collections.abc import Sequence
from pathlib import Path

import trl
from tokenizers import Tokenizer, decoders, models, processors
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

TRL_TEMPLATES = {
    path.stem: path.read_text(encoding="utf-8")
    for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
}
"""Every chat template that the installed TRL ships, by name."""

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OPTIONS_TEMPLATE = (
    "{% if tools %}<|im_start|>tools {{ tools|tojson }}<|im_end|>{% endif %}"
    "{% if style is defined %}<|im_start|>style {{ style|tojson }}<|im_end|>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.tool_calls %}{{ m.tool_calls|tojson }}{% else %}{{ m.content }}{% endif %}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""It writes every option and every tool call that it is given, as JSON."""
MARKUP = re.compile(r"<[|\uff5c/]?[\w\u2581]+[|\uff5c]?>|\[gMASK\]")  # DeepSeek writes U+FF5C


def byte_level(
    template: str | None = CHATML,
    *,
    eos: str = "<eos>",
    merges: Sequence[tuple[str, str]] = (),
    post: str | None = None,
) -> PreTrainedTokenizerFast:
    """Pad is 0, `<bos>` 1, `<eos>` 2; every `<markup>` of the template is a token of its own.

    Args:
        merges: pairs of characters that become one token.
        post: what goes around every text, such as "<bos> $A <eos>".
    """
    special = dict.fromkeys(["<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>"])
    special |= dict.fromkeys(MARKUP.findall(template or ""))
    words = [*special, *sorted(ByteLevel.alphabet()), *(a + b for a, b in merges)]
    vocabulary = {word: number for number, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocabulary, list(merges)))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if post:
        pieces = [(word, vocabulary[word]) for word in special]
        backend.post_processor = processors.TemplateProcessing(single=post, special_tokens=pieces)
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token=eos
    )
    made.add_tokens(list(special), special_tokens=True)
    made.chat_template = template
    return made
