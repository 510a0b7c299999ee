"""What a run trains and towards what: adapter, objective, step, optimizer."""
