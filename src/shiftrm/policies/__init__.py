"""Training the policy: PPO (ours), and RLOO, GRPO, DPO and SFT (TRL's)."""
