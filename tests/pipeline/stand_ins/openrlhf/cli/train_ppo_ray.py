"""Stands in for `python3 -m openrlhf.cli.train_ppo_ray`: its flags, its requests, its files.

Flags as OpenRLHF declared them in August 2026 (commit 3c3be62); any other ends it. Each response is
sent alone, as its agent does: the whole decoded text with its special tokens.
"""

import argparse
import asyncio
import json
from pathlib import Path

import torch
from plain_trainer import ask, train
from transformers import AutoModelForCausalLM, AutoTokenizer

FLAGS = {
    "-": """
        actor.freeze_visual_encoder actor.gradient_checkpointing_enable
        actor.gradient_checkpointing_reentrant actor.muon.nesterov actor.muon.no_nesterov
        algo.advantage.is_correction_enable algo.advantage.no_std_norm
        algo.dynamic_filtering_enable algo.kl.use_loss ckpt.disable_ds ckpt.load_enable
        ckpt.save_hf critic.muon.nesterov critic.muon.no_nesterov critic.save_value_network
        data.apply_chat_template data.disable_fast_tokenizer ds.adam_offload ds.deepcompile
        ds.enable_sleep ds.load_in_4bit ds.overlap_comm ds.packing_samples
        ds.use_liger_kernel ds.use_universal_ckpt ref.offload reward.normalize_enable
        reward.offload train.async_enable train.colocate_actor_ref train.colocate_all
        train.colocate_critic_reward train.dynamic_batch_enable train.enable_ema
        train.full_determinism_enable train.partial_rollout_enable use_ms
        vllm.enable_prefix_caching vllm.enable_sleep vllm.enforce_eager vllm.sync_with_ray
    """,
    "adam|muon": """
        actor.optim critic.optim
    """,
    "bf16|fp16": """
        ds.param_dtype
    """,
    "eager|batched_mm|grouped_mm|deepgemm": """
        ds.experts_implementation
    """,
    "float": """
        actor.adam.eps actor.adam.lr actor.adam.weight_decay actor.aux_loss_coef
        actor.dual_clip actor.entropy_coef actor.eps_clip actor.lr_warmup_ratio
        actor.max_norm actor.min_lr_ratio actor.muon.lr actor.muon.momentum
        algo.advantage.gamma algo.advantage.lambd algo.kl.init_coef algo.kl.target
        ckpt.max_mem critic.adam.eps critic.adam.lr critic.adam.weight_decay
        critic.lr_warmup_ratio critic.max_norm critic.min_lr_ratio critic.muon.lr
        critic.muon.momentum critic.value_clip ds.lora.dropout eval.temperature
        reward.overlong_buffer_len reward.overlong_penalty_factor
        reward.stop_properly_penalty_coef rollout.temperature rollout.top_p train.ema_beta
        vllm.gpu_memory_utilization
    """,
    "float 2": """
        actor.adam.betas actor.eps_clip_low_high algo.advantage.is_correction_threshold
        algo.dynamic_filtering_range critic.adam.betas reward.clip_range
    """,
    "gae|reinforce|rloo|reinforce_baseline|group_norm|dr_grpo": """
        algo.advantage.estimator
    """,
    "int": """
        actor.muon.ns_steps actor.num_gpus_per_node actor.num_nodes algo.kl.horizon
        ckpt.max_num ckpt.save_steps critic.freezing_steps critic.muon.ns_steps
        critic.num_gpus_per_node critic.num_nodes data.dataloader_num_workers
        data.max_images_per_prompt data.max_len data.max_samples ds.lora.alpha ds.lora.rank
        ds.ring_attn_head_stride ds.ring_attn_size ds.tensor_parallel_size ds.zero_stage
        ds.zpg eval.n_samples_per_prompt eval.steps local_rank logger.logging_steps
        ref.num_gpus_per_node ref.num_nodes reward.num_gpus_per_node reward.num_nodes
        rollout.batch_size rollout.max_new_tokens rollout.max_tokens_per_gpu
        rollout.micro_batch_size rollout.n_samples_per_prompt
        rollout.vllm_generate_batch_size train.async_queue_size train.batch_size
        train.max_epochs train.max_tokens_per_gpu train.micro_batch_size train.num_episodes
        train.seed vllm.num_engines vllm.tensor_parallel_size
    """,
    "k1|k2|k3": """
        algo.kl.estimator
    """,
    "ppo|gspo": """
        actor.policy_loss_type
    """,
    "str": """
        actor.lr_scheduler actor.model_name_or_path ckpt.best_metric_key ckpt.output_dir
        ckpt.path critic.lr_scheduler critic.model_name_or_path data.image_key
        data.input_key data.input_template data.label_key data.prompt_dataset
        data.prompt_probs data.prompt_split ds.attn_implementation ds.grad_accum_dtype
        ds.value_head_prefix eval.dataset eval.split logger.tensorboard_dir
        logger.wandb.group logger.wandb.key logger.wandb.org logger.wandb.project
        logger.wandb.run_name reward.model_name_or_path reward.remote_url
        train.agent_func_path vllm.sync_backend
    """,
    "str *": """
        ds.lora.target_modules
    """,
    "tis|icepop|seq-mask-tis": """
        algo.advantage.is_correction_type
    """,
}
"""Names by type, number of values or choices; "-" marks a switch."""


def parser():
    made = argparse.ArgumentParser(allow_abbrev=False)
    for kind, names in FLAGS.items():
        options = {"action": "store_true"}
        if kind != "-":
            word, _, number = kind.partition(" ")
            options = {"nargs": int(number) if number.isdigit() else number or None}
            types = {"str": str, "int": int, "float": float}
            options |= {"type": types[word]} if word in types else {"choices": word.split("|")}
        for name in names.split():
            made.add_argument(f"--{name}", default=False if kind == "-" else None, **options)
    return made


def check(given):
    """What the real program asserts about how flags fit together."""
    engines = given["vllm.num_engines"] * given["vllm.tensor_parallel_size"]
    actors = given["actor.num_nodes"] * given["actor.num_gpus_per_node"]
    if given["train.colocate_all"]:
        assert engines == actors
        assert given["ref.num_nodes"] * given["ref.num_gpus_per_node"] == actors
    if given["algo.advantage.estimator"] in ("rloo", "reinforce_baseline", "group_norm", "dr_grpo"):
        assert given["rollout.n_samples_per_prompt"] > 1
    samples = given["rollout.n_samples_per_prompt"] * given["rollout.batch_size"]
    assert samples // given["rollout.micro_batch_size"] >= actors
    assert not given["vllm.enable_sleep"] or given["train.colocate_all"]
    assert given["reward.remote_url"].startswith("http")
    assert given["data.max_len"] > given["rollout.max_new_tokens"]


def prompts_of(given, tokenizer):
    with open(given["data.prompt_dataset"], encoding="utf-8") as lines:
        rows = [json.loads(line)[given["data.input_key"]] for line in lines]
    if not given["data.apply_chat_template"]:
        return rows
    rows = [[{"role": "user", "content": r}] if isinstance(r, str) else r for r in rows]
    return [
        tokenizer.apply_chat_template(row, tokenize=False, add_generation_prompt=True)
        for row in rows
    ]


async def rewards_of(given, queries):
    async def one(query, prompt):
        content = {"query": [query], "prompts": [prompt], "labels": [""]}
        answer = await asyncio.to_thread(ask, given["reward.remote_url"], content)
        score = answer.get("scores")
        return (answer["rewards"] if score is None else score)[0]

    return await asyncio.gather(*(one(query, prompt) for query, prompt in queries))


def main():
    given = vars(parser().parse_args())
    check(given)
    folder, output = given["actor.model_name_or_path"], given["ckpt.output_dir"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    policy = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(given["train.seed"])
    queries = []
    for prompt in prompts_of(given, tokenizer)[:4]:
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        whole = policy.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True,
            max_new_tokens=given["rollout.max_new_tokens"], pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        queries.append((tokenizer.decode(whole[0], skip_special_tokens=False), prompt))
    rewards = asyncio.run(rewards_of(given, queries))
    print("rewards", json.dumps(rewards), flush=True)
    (Path(given["ckpt.path"]) / "global_step1").mkdir(parents=True)
    train(folder, output)


if __name__ == "__main__":
    main()
