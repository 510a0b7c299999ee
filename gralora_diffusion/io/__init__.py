"""Files, the Hub, the process and its terminal: how the package reads and writes."""
