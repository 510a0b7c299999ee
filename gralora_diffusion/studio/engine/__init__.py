"""What the studio does, without a page: its folder, its processes, its runs, its forms."""
