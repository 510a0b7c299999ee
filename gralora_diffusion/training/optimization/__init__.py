"""What a run optimizes and how: adapter, objective, step, optimizer."""
