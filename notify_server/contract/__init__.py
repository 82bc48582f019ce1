"""The platform's contract: its messages as bytes and as checked types. Pure: no I/O and no clock."""
