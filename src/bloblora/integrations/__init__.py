"""Other projects' interfaces; each file needs that project, and nothing else of bloblora needs the file."""
