"""What runs inside the sandbox. These files are copied into it and use only Python's standard library."""
