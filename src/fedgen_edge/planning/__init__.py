"""What will a run take? Bytes, memory and time, before anything is bought."""
