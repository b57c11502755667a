"""What a process has around it: other processes, signals, time, memory, compiled programs."""
