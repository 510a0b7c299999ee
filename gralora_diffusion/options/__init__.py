"""Options of a command as dataclasses: fields with help texts, from a command line and YAML."""
