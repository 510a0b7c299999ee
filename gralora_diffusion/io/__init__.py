"""Files, the Hub, the process and its terminal: what the package reads and writes, and how."""
