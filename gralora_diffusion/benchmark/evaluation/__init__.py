"""How a trial is evaluated: encoders, scores, results on disk, statistics."""
