"""What the platform sends, as bytes and as checked types. Pure: no I/O and no clock."""
