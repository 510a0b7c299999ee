"""``--dry_run``: what a run would train and how much memory it would need, without weights."""
