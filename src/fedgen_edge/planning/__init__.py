"""What will a run take? Bytes sent, memory and time, before any hardware is bought."""
