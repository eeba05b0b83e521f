"""A reward server over HTTP for other people's trainers, and a client for it.

`shiftrm serve` runs `server.run`; import `client.RewardClient` into a training script, which needs
no server packages.
"""
