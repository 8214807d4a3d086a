"""What `gossamer bench` and the scripts in benchmarks/ measure with."""
