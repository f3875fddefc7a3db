"""How a step is made: one process, DDP, FSDP2 (engine.py); DeepSpeed's ZeRO; accelerate set up for one run."""
