"""What the dry runs of commands share: memory counted on fake tensors, and the page that says what a command would take."""
