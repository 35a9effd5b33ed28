"""What a configuration costs on a cluster, by formula: memory, bytes sent, time; and which layouts to try. Nothing is run."""
