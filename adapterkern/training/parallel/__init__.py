"""How a step runs: in one process, under DDP or FSDP2 (engine.py), or under DeepSpeed; accelerate set up for it."""
