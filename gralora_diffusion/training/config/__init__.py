"""The options of a training run: what there is, as one object, from a command line and YAML."""
