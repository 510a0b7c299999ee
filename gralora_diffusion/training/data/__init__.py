"""Images and captions: found, checked, cropped, ordered, encoded, in batches."""
