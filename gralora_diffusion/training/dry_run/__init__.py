"""What a run would train and the memory it would take, without weights: ``--dry_run``."""
