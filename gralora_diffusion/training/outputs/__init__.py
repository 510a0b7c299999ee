"""The outputs of a run: metrics, validation images, model card, metadata, its folder."""
