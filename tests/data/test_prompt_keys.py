"""Keys of prompts, and draws that depend on a text alone."""

from shiftrm.data.prompt_keys import hashed_uniform, prompt_key


def asked(content, **more):
    return [{"role": "user", "content": content, **more}]


def test_prompts_that_differ_in_form_alone_have_one_key():
    """Otherwise contrast teaches a preference between two answers to one question."""
    same = [
        asked("What is a cat?"),
        asked(" What is  a\ncat? "),
        asked("What is a cat?", tool_calls=None),
        asked([{"type": "text", "text": "What is "}, {"type": "text", "text": "a cat?"}]),
    ]
    assert len({prompt_key(prompt) for prompt in same}) == 1
    assert prompt_key("What is a cat?") == prompt_key(" What is  a\ncat?\n") == "What is a cat?"
    others = [
        asked("What is a dog?"),
        [{"role": "system", "content": "Be nice."}, *asked("What is a cat?")],
        [{"role": "system", "content": "What is a cat?"}],
        asked("What is a cat?", name="ann"),
    ]
    assert len({prompt_key(prompt) for prompt in [*same, *others]}) == 5


def test_hashed_draws_are_uniform_and_fixed():
    draws = [hashed_uniform(0, "x", str(i)) for i in range(2000)]
    assert abs(sum(draws) / 2000 - 0.5) < 0.03
    assert 0.0 <= min(draws) < 0.01 < 0.99 < max(draws) < 1.0
    assert hashed_uniform(1, "x", "0") != draws[0] == hashed_uniform(0, "x", "0")
    assert hashed_uniform(0, "\ud83d") < 1.0  # a lone surrogate, as JSON may hold it
