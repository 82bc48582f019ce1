"""Events and their payloads: what receivers get."""
