"""Made-up files in the exact schemas of the public data sets, of any number of rows.

Each `write_x(path, n, seed)` writes n rows and returns the path. Rows are clean: all of them are
kept. Who wants quirks changes a row (`hh_row(...)` and the like). The text is short and of few
words, so that tiny models with small vocabularies can be trained on it; the preferred side is
recognisable (it says "please"), so that a reward model has something to learn.
"""

import gzip
import json
import random

WORDS = [
    *("red", "blue", "small", "old", "warm", "loud"),
    *("cat", "dog", "tree", "house", "bread", "river", "stone", "cloud"),
]
GOOD, BAD = "please enjoy", "go away"


def _words(rng, count):
    return " ".join(rng.choice(WORDS) for _ in range(count))


def _sides(rng):
    """Two responses, the better one first."""
    return f"{GOOD} the {_words(rng, 3)} .", f"{BAD} from the {_words(rng, 3)} ."


def _question(rng, number):
    """Different for every number, so that nothing is a duplicate by chance."""
    return f"what is the {_words(rng, 2)} number {number} ?"


def placed(rows):
    """Rows with their places, as readers give them."""
    return [(f"f:{number}", row) for number, row in enumerate(rows, start=1)]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def write_rows(path, rows):
    """JSON lines as the public files have them: ASCII escapes, packed if the name says .gz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        with gzip.open(path, "wt", encoding="utf-8") as handle:
            handle.write(text)
    else:
        path.write_text(text, encoding="utf-8")
    return path


# -- HH-RLHF ---------------------------------------------------------------------------------


def transcript(*turns):
    """Human and assistant in turn, as HH-RLHF writes them."""
    names = ("Human", "Assistant")
    return "".join(f"\n\n{names[i % 2]}: {turn}" for i, turn in enumerate(turns))


def hh_row(*history, chosen, rejected):
    """A row whose sides share their history and part at the last turn."""
    return {
        "chosen": transcript(*history, chosen),
        "rejected": transcript(*history, rejected),
    }


def hh_rows(n, seed=0):
    rng = random.Random(f"hh {seed}")
    rows = []
    for number in range(n):
        history = [_question(rng, number)]
        if rng.random() < 0.5:
            history += [f"the {_words(rng, 2)} .", f"why the {_words(rng, 1)} ?"]
        chosen, rejected = _sides(rng)
        rows.append(hh_row(*history, chosen=chosen, rejected=rejected))
    return rows


def write_hh(path, n, seed=0):
    """Anthropic/hh-rlhf: one file, also `.jsonl.gz`."""
    return write_rows(path, hh_rows(n, seed))


def write_hh_folder(folder, n, seed=0):
    """The hub's layout: four folders with train and test, n and about n / 5 rows each."""
    names = ("helpful-base", "helpful-online", "helpful-rejection-sampled", "harmless-base")
    for number, name in enumerate(names):
        for split, count in (("train", n), ("test", max(2, n // 5))):
            write_hh(folder / name / f"{split}.jsonl.gz", count, f"{seed} {number} {split}")
    return folder


# -- summaries -------------------------------------------------------------------------------


def comparison_row(**changes):
    """openai/summarize_from_feedback, comparisons; the second summary is the better one."""
    return {
        "info": {
            "id": "t3_1",
            "post": "My cat eats bread. What to do?",
            "title": "Cat and bread",
            "subreddit": "AskReddit",
            "site": None,
            "article": None,
        },
        "summaries": [
            {"text": " Cat.", "policy": "sup4", "note": "too short"},
            {"text": " My cat eats bread, what to do?", "policy": "ref", "note": ""},
        ],
        "choice": 1,
        "worker": "w1",
        "batch": "batch3",
        "split": "train",
        "extra": {"confidence": 8},
        **changes,
    }


def comparison_rows(n, seed=0, split="train"):
    rng = random.Random(f"comparisons {seed} {split}")
    rows = []
    for number in range(n):
        good, bad = _sides(rng)
        choice = rng.randrange(2)
        texts = [bad, good] if choice else [good, bad]
        base = comparison_row()
        rows.append(
            comparison_row(
                info=base["info"] | {"id": f"t3_{number}", "post": _question(rng, number)},
                summaries=[{"text": f" {t}", "policy": "sup4", "note": ""} for t in texts],
                choice=choice,
                split=split,
            )
        )
    return rows


def write_comparisons(path, n, seed=0, split="train"):
    return write_rows(path, comparison_rows(n, seed, split))


def post_row(**changes):
    """A TL;DR post, as OpenAI filtered them."""
    return {
        "id": "t3_1",
        "subreddit": "AskReddit",
        "title": "Cat and bread",
        "post": "My cat eats bread. What to do?",
        "summary": "My cat eats bread, what to do?",
        **changes,
    }


def write_posts(path, n, seed=0):
    rng = random.Random(f"posts {seed}")
    rows = [
        post_row(id=f"t3_{i}", post=_question(rng, i), summary=_sides(rng)[0]) for i in range(n)
    ]
    return write_rows(path, rows)


# -- ShareGPT --------------------------------------------------------------------------------


def sharegpt_row(*turns, id="a_0"):
    """Turns as `(from, value)`."""
    return {"id": id, "conversations": [{"from": who, "value": text} for who, text in turns]}


def write_sharegpt(path, n, seed=0):
    """One JSON list, as the public file is."""
    rng = random.Random(f"sharegpt {seed}")
    rows = []
    for number in range(n):
        turns = [("human", _question(rng, number)), ("gpt", _sides(rng)[0])]
        if rng.random() < 0.5:
            turns += [("human", f"why the {_words(rng, 1)} ?"), ("gpt", _sides(rng)[0])]
        rows.append(sharegpt_row(*turns, id=f"x{number}_0"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


# -- OASST1 ----------------------------------------------------------------------------------


def oasst_row(id, parent=None, *, tree=None, **changes):
    """One message; a root unless it has a parent."""
    return {
        "message_id": id,
        "parent_id": parent,
        "user_id": "u1",
        "created_date": "2023-02-05T14:23:50.983374+00:00",
        "text": f"text of {id}",
        "role": "prompter" if parent is None else "assistant",
        "lang": "en",
        "review_count": 3,
        "review_result": True,
        "deleted": False,
        "rank": None,
        "synthetic": False,
        "model_name": None,
        "detoxify": None,
        "message_tree_id": tree or id,
        "tree_state": "ready_for_export",
        "emojis": None,
        "labels": None,
        **changes,
    }


def write_oasst1(path, n, seed=0, answers=2):
    """n trees: a prompt and its ranked answers, the best of which is asked on and answered."""
    rng = random.Random(f"oasst {seed}")
    rows = []
    for number in range(n):
        tree = f"tree{number}"
        rows.append(oasst_row(tree, text=_question(rng, number)))
        for rank in range(answers):
            text = _sides(rng)[min(rank, 1)]
            rows.append(oasst_row(f"{tree}a{rank}", tree, tree=tree, text=text, rank=rank))
        follow = f"why the {_words(rng, 1)} number {number} ?"
        rows.append(oasst_row(f"{tree}q", f"{tree}a0", tree=tree, role="prompter", text=follow))
        for rank in range(2):
            text = _sides(rng)[rank]
            rows.append(oasst_row(f"{tree}b{rank}", f"{tree}q", tree=tree, text=text, rank=rank))
    return write_rows(path, rows)


# -- PKU-SafeRLHF ----------------------------------------------------------------------------


def pku_row(**changes):
    """Response 0 is the more helpful one, response 1 the more harmless one."""
    return {
        "prompt": "How do I open a lock?",
        "response_0": "With a pick, like this.",
        "response_1": "Ask a locksmith.",
        "prompt_source": "Alpaca3-70B",
        "response_0_source": "Alpaca3-8B",
        "response_1_source": "Alpaca2-7B",
        "is_response_0_safe": False,
        "is_response_1_safe": True,
        "response_0_harm_category": {"Privacy Violation": False},
        "response_1_harm_category": {"Privacy Violation": False},
        "response_0_severity_level": 1,
        "response_1_severity_level": 0,
        "better_response_id": 0,
        "safer_response_id": 1,
        "response_0_sha256": "0",
        "response_1_sha256": "1",
        **changes,
    }


def write_pku(path, n, seed=0):
    """The two ids disagree on about a third of the rows."""
    rng = random.Random(f"pku {seed}")
    rows = []
    for number in range(n):
        sides = _sides(rng)
        safer = rng.randrange(2)
        better = safer if rng.random() < 0.67 else 1 - safer
        rows.append(
            pku_row(
                prompt=_question(rng, number),
                response_0=sides[safer],
                response_1=sides[1 - safer],
                is_response_0_safe=safer == 0,
                is_response_1_safe=safer == 1,
                better_response_id=better,
                safer_response_id=safer,
            )
        )
    return write_rows(path, rows)


# -- UltraFeedback ---------------------------------------------------------------------------


def binarized_row(prompt, chosen, rejected, scores=(8.5, 4.0), **changes):
    """HuggingFaceH4/ultrafeedback_binarized."""
    ask = {"content": prompt, "role": "user"}
    sides = [[ask, {"content": text, "role": "assistant"}] for text in (chosen, rejected)]
    return {
        "prompt": prompt,
        "prompt_id": "0",
        "chosen": sides[0],
        "rejected": sides[1],
        "messages": sides[0],
        "score_chosen": scores[0],
        "score_rejected": scores[1],
        **changes,
    }


def write_binarized(path, n, seed=0):
    rng = random.Random(f"binarized {seed}")
    return write_rows(path, [binarized_row(_question(rng, i), *_sides(rng)) for i in range(n)])


def _fine(score):
    """A mean fine-grained rating, 1 to 5, that agrees with an overall score of 1 to 10."""
    return 1 + (score - 1) * 4 / 9 if isinstance(score, float | int) and score == score else 4.0


def ultrafeedback_row(instruction, *rated, **changes):
    """openbmb/UltraFeedback; completions as `(response, overall_score)`."""
    return {
        "source": "evol_instruct",
        "instruction": instruction,
        "models": [f"model-{i}" for i in range(len(rated))],
        "completions": [
            {
                "annotations": {},
                "custom_system_prompt": "You are a helpful assistant.",
                "model": f"model-{i}",
                "principle": "helpfulness",
                "response": text,
                "critique": "",
                "fine-grained_score": _fine(score),
                "overall_score": score,
            }
            for i, (text, score) in enumerate(rated)
        ],
        "correct_answers": ["None"],
        "incorrect_answers": ["None"],
        **changes,
    }


def write_ultrafeedback(path, n, seed=0):
    rng = random.Random(f"ultrafeedback {seed}")
    rows = []
    for number in range(n):
        good, bad = zip(*(_sides(rng) for _ in range(2)), strict=True)
        rated = [(good[0], 9.0), (bad[0], 3.0), (good[1], 7.5), (bad[1], 2.0)]
        rng.shuffle(rated)
        rows.append(ultrafeedback_row(_question(rng, number), *rated))
    return write_rows(path, rows)
