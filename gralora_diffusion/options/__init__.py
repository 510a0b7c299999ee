"""Options of a command as dataclasses: fields with help texts, parsed from arguments and YAML."""
