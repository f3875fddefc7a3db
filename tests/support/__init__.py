"""What tests share: tiny models and runs, oracles, processes. No test module imports another."""
