"""How every weight of a checkpoint comes into a program's files: one plan, one stream; a backend brings the data."""
