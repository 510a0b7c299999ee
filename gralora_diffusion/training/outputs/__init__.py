"""What a run leaves: metrics, validation images, model card, metadata, its folder."""
