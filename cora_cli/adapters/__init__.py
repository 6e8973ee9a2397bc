"""Mode -> PEFT model: one table of what starts where and what trains, its installation, its storage."""
