"""What a federation will take, before anything is bought: bytes, memory and time."""
